// Runs an OpenVINO bundle on one raw RGB picture: run_openvino BUNDLE IMAGE.rgb [GOLDEN.f32 MIN_SQNR_DB]

#include <openvino/openvino.hpp>

#include "common.hpp"

static std::vector<float> run(const dualtoken::Arguments& arguments) {
    ov::Core core;
    // without the hint a CPU may compute in a smaller type than the bundle was checked in
    ov::CompiledModel model = core.compile_model((arguments.bundle / "model.xml").string(), "CPU",
                                                 ov::hint::inference_precision(ov::element::f32));
    const ov::Output<const ov::Node> input = model.input();
    if (input.get_element_type() != ov::element::u8 || !input.get_partial_shape().is_static()) {
        throw std::runtime_error("this program takes a bundle with an image input and a fixed batch");
    }
    std::vector<char> pixels = dualtoken::read_image(arguments.image, ov::shape_size(input.get_shape()));
    ov::InferRequest request = model.create_infer_request();
    request.set_input_tensor(ov::Tensor(ov::element::u8, input.get_shape(), pixels.data()));
    request.infer();
    const ov::Tensor logits = request.get_output_tensor();
    return {logits.data<float>(), logits.data<float>() + logits.get_size()};
}

int main(int argc, char** argv) { return dualtoken::guarded(argc, argv, run); }
