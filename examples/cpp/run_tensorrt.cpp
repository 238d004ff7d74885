// Runs the engine of a TensorRT bundle on one raw RGB picture: run_tensorrt BUNDLE IMAGE.rgb [GOLDEN.f32 MIN_SQNR_DB]
// TensorRT 10 and 11. An engine whose batch is dynamic runs with a batch of one.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <memory>

#include "common.hpp"

namespace {

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kWARNING) {
            std::fprintf(stderr, "TensorRT: %s\n", text);
        }
    }
};

void check(cudaError_t status) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
    }
}

struct Free {
    void operator()(void* pointer) const { cudaFree(pointer); }
};
using DeviceMemory = std::unique_ptr<void, Free>;

DeviceMemory allocate(std::size_t bytes) {
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, bytes));
    return DeviceMemory(pointer);
}

struct Stream {
    cudaStream_t handle{};
    Stream() { check(cudaStreamCreate(&handle)); }
    ~Stream() { cudaStreamDestroy(handle); }
};

// Elements of a shape whose batch, the first dimension, may be open.
std::size_t elements(nvinfer1::Dims& shape) {
    std::size_t count = 1;
    for (int i = 0; i < shape.nbDims; ++i) {
        if (shape.d[i] < 0) {
            shape.d[i] = 1;
        }
        count *= static_cast<std::size_t>(shape.d[i]);
    }
    return count;
}

std::vector<float> run(const dualtoken::Arguments& arguments) {
    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
    if (!runtime) {
        throw std::runtime_error("TensorRT does not start here");
    }
    // set this to true for an engine that was built with --version-compatible, and for no engine that you do not trust
    runtime->setEngineHostCodeAllowed(false);
    const std::vector<char> plan = dualtoken::read_bytes(arguments.bundle / "model.engine");
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine) {
        throw std::runtime_error("TensorRT refuses the engine; build it here: dualtoken build BUNDLE --rebuild");
    }
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
    if (!context || engine->getNbIOTensors() != 2) {
        throw std::runtime_error("the engine does not have one input and one output");
    }
    const bool first_is_input =
        engine->getTensorIOMode(engine->getIOTensorName(0)) == nvinfer1::TensorIOMode::kINPUT;
    const char* input = engine->getIOTensorName(first_is_input ? 0 : 1);
    const char* output = engine->getIOTensorName(first_is_input ? 1 : 0);
    if (engine->getTensorDataType(input) != nvinfer1::DataType::kUINT8) {
        throw std::runtime_error("this program takes a bundle with an image input");
    }
    nvinfer1::Dims input_shape = engine->getTensorShape(input), output_shape = engine->getTensorShape(output);
    const std::vector<char> pixels = dualtoken::read_image(arguments.image, elements(input_shape));
    std::vector<float> logits(elements(output_shape));
    const std::size_t bytes = logits.size() * sizeof(float);
    const DeviceMemory device_input = allocate(pixels.size()), device_output = allocate(bytes);
    const Stream stream;
    if (!context->setInputShape(input, input_shape) || !context->setTensorAddress(input, device_input.get()) ||
        !context->setTensorAddress(output, device_output.get())) {
        throw std::runtime_error("the engine takes no batch of one");
    }
    check(cudaMemcpyAsync(device_input.get(), pixels.data(), pixels.size(), cudaMemcpyHostToDevice, stream.handle));
    if (!context->enqueueV3(stream.handle)) {
        throw std::runtime_error("TensorRT could not run the engine");
    }
    check(cudaMemcpyAsync(logits.data(), device_output.get(), bytes, cudaMemcpyDeviceToHost, stream.handle));
    check(cudaStreamSynchronize(stream.handle));
    return logits;
}

}  // namespace

int main(int argc, char** argv) { return dualtoken::guarded(argc, argv, run); }
