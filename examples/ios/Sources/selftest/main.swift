// selftest MODEL.mlpackage GOLDEN.json: runs the golden input and fails if the SQNR is below the manifest's tolerance.
// Not built here. GOLDEN.json comes from golden_json.py beside this package.
import CoreGraphics
import DualTokenClassifier
import Foundation

struct Golden: Decodable {
    let width: Int
    let height: Int
    let rgbaBase64: String
    let logits: [Float]
    let minimumSqnrDb: Double
}

func picture(_ golden: Golden) -> CGImage? {
    guard let bytes = Data(base64Encoded: golden.rgbaBase64), let provider = CGDataProvider(data: bytes as CFData),
          let space = CGColorSpace(name: CGColorSpace.sRGB) else { return nil }
    return CGImage(
        width: golden.width, height: golden.height, bitsPerComponent: 8, bitsPerPixel: 32,
        bytesPerRow: 4 * golden.width, space: space,
        bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.noneSkipLast.rawValue), provider: provider, decode: nil,
        shouldInterpolate: false, intent: .defaultIntent)
}

let arguments = CommandLine.arguments
guard arguments.count == 3 else {
    print("usage: selftest MODEL.mlpackage GOLDEN.json")
    exit(2)
}
let golden = try JSONDecoder().decode(Golden.self, from: Data(contentsOf: URL(fileURLWithPath: arguments[2])))
let classifier = try await Classifier(package: URL(fileURLWithPath: arguments[1]))
guard let image = picture(golden) else {
    print("the golden picture cannot be made")
    exit(4)
}
let logits = try await classifier.logits(image)
let signal = zip(golden.logits, logits).reduce(0.0) { $0 + pow(Double($1.0), 2) }
let noise = zip(golden.logits, logits).reduce(0.0) { $0 + pow(Double($1.0 - $1.1), 2) }
let sqnr = noise == 0 ? Double.infinity : 10 * log10(signal / noise)
print(String(format: "SQNR %.1f dB, at least %.1f dB are needed", sqnr, golden.minimumSqnrDb))
for guess in try await classifier.classify(image) {
    print(String(format: "%.4f  %@", guess.probability, guess.label))
}
exit(logits.count == golden.logits.count && sqnr >= golden.minimumSqnrDb ? 0 : 5)
