// Runs an AOTInductor bundle for the CPU on one raw RGB picture, without Python:
// run_aotinductor BUNDLE IMAGE.rgb [GOLDEN.f32 MIN_SQNR_DB]

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include "common.hpp"

static std::vector<float> run(const dualtoken::Arguments& arguments) {
    const c10::InferenceMode mode;
    torch::inductor::AOTIModelPackageLoader loader((arguments.bundle / "model.pt2").string());
    // a package does not tell its shapes; the bundle's pictures are square here
    std::vector<char> pixels = dualtoken::read_bytes(arguments.image);
    const auto side = static_cast<std::int64_t>(std::lround(std::sqrt(static_cast<double>(pixels.size()) / 3.0)));
    if (static_cast<std::size_t>(side * side * 3) != pixels.size()) {
        throw std::runtime_error(arguments.image.string() + " is not a square of RGB bytes");
    }
    const torch::Tensor image = torch::from_blob(pixels.data(), {1, side, side, 3}, torch::kUInt8);
    const torch::Tensor logits = loader.run({image}).at(0).contiguous();
    return {logits.data_ptr<float>(), logits.data_ptr<float>() + logits.numel()};
}

int main(int argc, char** argv) { return dualtoken::guarded(argc, argv, run); }
