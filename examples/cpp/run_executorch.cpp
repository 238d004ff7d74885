// Runs an ExecuTorch bundle on one raw RGB picture: run_executorch BUNDLE IMAGE.rgb [GOLDEN.f32 MIN_SQNR_DB]

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include "common.hpp"

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;

static std::vector<float> run(const dualtoken::Arguments& arguments) {
    Module module((arguments.bundle / "model.pte").string());
    const auto meta = module.method_meta("forward");
    if (!meta.ok()) {
        throw std::runtime_error("ExecuTorch cannot load " + (arguments.bundle / "model.pte").string());
    }
    const auto input = meta->input_tensor_meta(0);
    if (!input.ok() || input->scalar_type() != ScalarType::Byte) {
        throw std::runtime_error("this program takes a bundle with an image input");
    }
    std::vector<char> pixels = dualtoken::read_image(arguments.image, input->nbytes());
    const std::vector<executorch::aten::SizesType> sizes(input->sizes().begin(), input->sizes().end());
    const auto image = from_blob(pixels.data(), sizes, ScalarType::Byte);
    const auto outputs = module.forward(image);
    if (!outputs.ok()) {
        throw std::runtime_error("ExecuTorch stopped with error " +
                                 std::to_string(static_cast<int>(outputs.error())));
    }
    const auto logits = outputs->at(0).toTensor();
    return {logits.const_data_ptr<float>(), logits.const_data_ptr<float>() + logits.numel()};
}

int main(int argc, char** argv) { return dualtoken::guarded(argc, argv, run); }
