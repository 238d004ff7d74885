// swift-tools-version: 5.9
// Not built here: there is no Mac on the machines that this project is tested on.
import PackageDescription

let package = Package(
    name: "DualTokenClassifier",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [.library(name: "DualTokenClassifier", targets: ["DualTokenClassifier"])],
    targets: [
        .target(name: "DualTokenClassifier"),
        .executableTarget(name: "selftest", dependencies: ["DualTokenClassifier"]),
    ]
)
