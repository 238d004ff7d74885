// Loads an exported model.mlpackage and classifies pictures. Not built here: typed against the documented API of Core ML.
import CoreGraphics
import CoreML
import Foundation

public struct Guess: Sendable {
    public let label: String
    public let probability: Double
}

public struct Classifier {
    private let model: MLModel

    /// Compiles and loads a package, e.g. one that was downloaded. An app that has the package in its Xcode target
    /// passes `Bundle.main.url(forResource: "model", withExtension: "mlmodelc")` to `init(compiled:)` instead.
    public init(package: URL, computeUnits: MLComputeUnits = .all) async throws {
        try await self.init(compiled: MLModel.compileModel(at: package), computeUnits: computeUnits)
    }

    public init(compiled: URL, computeUnits: MLComputeUnits = .all) async throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
    }

    /// The likeliest classes. Core ML scales the picture to the input's size; crop it to its centre square first, since the
    /// model was validated on centre crops (docs/bundle.md has the exact preprocessing).
    public func classify(_ image: CGImage, top: Int = 5) async throws -> [Guess] {
        let output = try await predict(image)
        guard let all = output.featureValue(for: "classLabel_probs")?.dictionaryValue as? [String: NSNumber] else {
            return []
        }
        return all.map { Guess(label: $0.key, probability: $0.value.doubleValue) }
            .sorted { $0.probability > $1.probability }
            .prefix(top).map { $0 }
    }

    /// Raw class scores in the order of labels.txt.
    public func logits(_ image: CGImage) async throws -> [Float] {
        let output = try await predict(image)
        guard let array = output.featureValue(for: "logits")?.multiArrayValue else { return [] }
        return (0..<array.count).map { array[$0].floatValue }
    }

    private func predict(_ image: CGImage) async throws -> MLFeatureProvider {
        let description = model.modelDescription.inputDescriptionsByName["image"]
        guard let constraint = description?.imageConstraint else {
            throw CocoaError(.featureUnsupported)  // exported with --input tensor
        }
        let value = try MLFeatureValue(cgImage: image, constraint: constraint, options: nil)
        return try await model.prediction(from: MLDictionaryFeatureProvider(dictionary: ["image": value]))
    }
}
