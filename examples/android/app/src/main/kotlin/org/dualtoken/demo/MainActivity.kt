package org.dualtoken.demo

import android.graphics.ImageDecoder
import android.net.Uri
import android.os.Bundle
import android.widget.Button
import android.widget.LinearLayout
import android.widget.TextView
import androidx.activity.ComponentActivity
import androidx.activity.result.PickVisualMediaRequest
import androidx.activity.result.contract.ActivityResultContracts
import androidx.activity.result.contract.ActivityResultContracts.PickVisualMedia
import kotlin.concurrent.thread
import kotlin.math.exp

/** A picked photo's five likeliest classes, and how long they took. The flavour has the Model. */
class MainActivity : ComponentActivity() {
    private lateinit var said: TextView
    private lateinit var contract: Contract
    private lateinit var labels: List<String>
    private lateinit var model: Model

    private val pick = registerForActivityResult(ActivityResultContracts.PickVisualMedia()) { picked ->
        picked?.let { inBackground { classify(it) } }
    }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        said = TextView(this).apply { textSize = 18f }
        val button = Button(this).apply {
            text = "Pick a photo"
            setOnClickListener { pick.launch(PickVisualMediaRequest(PickVisualMedia.ImageOnly)) }
        }
        setContentView(LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            addView(button)
            addView(said)
        })
        inBackground {
            contract = Contract(assets.text("manifest.json"))
            labels = assets.text("labels.txt").lines().filter { it.isNotEmpty() }
            model = Model(this, contract)
            "self-test: %.1f dB".format(SelfTest(assets.text("golden.json")).check(model::run))
        }
    }

    private fun classify(uri: Uri): String {
        val source = ImageDecoder.createSource(contentResolver, uri)
        val picture = ImageDecoder.decodeBitmap(source) { decoder, _, _ ->
            decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE // whose pixels can be read
        }
        val bytes = pixels(picture, contract)
        val start = System.nanoTime()
        val logits = model.run(bytes)
        val milliseconds = (System.nanoTime() - start) / 1e6
        return top(logits, labels) + "\n%.1f ms".format(milliseconds)
    }

    private fun inBackground(work: () -> String) {
        thread {
            val text = try {
                work()
            } catch (error: Exception) {
                "error: ${error.message}"
            }
            runOnUiThread { said.text = text }
        }
    }
}

fun top(logits: FloatArray, labels: List<String>, count: Int = 5): String {
    val largest = logits.max()
    val weights = logits.map { exp((it - largest).toDouble()) }
    val sum = weights.sum()
    return logits.indices.sortedByDescending { logits[it] }.take(count)
        .joinToString("\n") { "%.4f  %s".format(weights[it] / sum, labels.getOrElse(it) { i -> "$i" }) }
}
