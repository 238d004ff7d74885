plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "org.dualtoken.demo"
    compileSdk = 36

    defaultConfig {
        applicationId = "org.dualtoken.demo"
        minSdk = 28
        targetSdk = 36
        versionCode = 1
        versionName = "1"
    }

    // one runtime an app: `./gradlew installLitertDebug` takes model.tflite, `installExecutorchDebug` model.pte
    flavorDimensions += "runtime"
    productFlavors {
        create("litert") { dimension = "runtime" }
        create("executorch") { dimension = "runtime" }
    }

    androidResources { noCompress += listOf("tflite", "pte") } // read as they lie in the package
    kotlinOptions { jvmTarget = "17" }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

dependencies {
    implementation("androidx.activity:activity-ktx:1.11.0")
    "litertImplementation"("com.google.ai.edge.litert:litert:2.3.0")
    "executorchImplementation"("org.pytorch:executorch-android:1.5.1")
}
