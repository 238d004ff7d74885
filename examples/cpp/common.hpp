// What the example programs share: arguments, files, the five likeliest classes, and the check against golden logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace dualtoken {

// RUNNER BUNDLE IMAGE.rgb [GOLDEN.f32 MIN_SQNR_DB]
struct Arguments {
    std::filesystem::path bundle, image, golden;
    double least_sqnr_db = 0.0;
};

inline Arguments parse(int argc, char** argv) {
    if (argc != 3 && argc != 5) {
        throw std::invalid_argument(std::string("usage: ") + argv[0] + " BUNDLE IMAGE.rgb [GOLDEN.f32 MIN_SQNR_DB]");
    }
    Arguments arguments{argv[1], argv[2], {}, 0.0};
    if (argc == 5) {
        arguments.golden = argv[3];
        arguments.least_sqnr_db = std::stod(argv[4]);
    }
    return arguments;
}

inline std::vector<char> read_bytes(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error("cannot read " + path.string());
    }
    return {std::istreambuf_iterator<char>(file), {}};
}

// The picture as the bundle wants it: uint8 RGB, rows from the top, of the engine's own size; nothing is resized here.
inline std::vector<char> read_image(const std::filesystem::path& path, std::size_t bytes) {
    std::vector<char> pixels = read_bytes(path);
    if (pixels.size() != bytes) {
        throw std::runtime_error(path.string() + " has " + std::to_string(pixels.size()) + " bytes, the model takes " +
                                 std::to_string(bytes));
    }
    return pixels;
}

inline std::vector<std::string> read_labels(const std::filesystem::path& bundle) {
    std::ifstream file(bundle / "labels.txt");
    std::vector<std::string> labels;
    for (std::string line; std::getline(file, line);) {
        labels.push_back(line);
    }
    return labels;
}

// 10 log10(sum expected^2 / sum (actual - expected)^2)
inline double sqnr_db(const std::vector<float>& expected, const std::vector<float>& actual) {
    double signal = 0.0, noise = 0.0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        const double error = static_cast<double>(actual[i]) - expected[i];
        signal += static_cast<double>(expected[i]) * expected[i];
        noise += error * error;
    }
    return noise == 0.0 ? 300.0 : 10.0 * std::log10(signal / noise);
}

inline void print_top(const std::vector<float>& logits, const std::vector<std::string>& labels) {
    const float largest = *std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (float logit : logits) {
        sum += std::exp(static_cast<double>(logit) - largest);
    }
    std::vector<std::size_t> order(logits.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const std::size_t count = std::min<std::size_t>(5, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                      [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
    for (std::size_t i = 0; i < count; ++i) {
        const std::size_t index = order[i];
        const std::string label = index < labels.size() ? labels[index] : std::to_string(index);
        std::printf("%.4f  %s\n", std::exp(static_cast<double>(logits[index]) - largest) / sum, label.c_str());
    }
}

// Prints the result; 0, or 5 where golden logits were given and not reached.
inline int report(const Arguments& arguments, const std::vector<float>& logits) {
    print_top(logits, read_labels(arguments.bundle));
    if (arguments.golden.empty()) {
        return 0;
    }
    const std::vector<char> bytes = read_bytes(arguments.golden);
    if (bytes.size() != logits.size() * sizeof(float)) {
        throw std::runtime_error(arguments.golden.string() + " does not have the model's number of logits");
    }
    std::vector<float> expected(logits.size());
    std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(expected.data()));
    const double found = sqnr_db(expected, logits);
    std::printf("SQNR to golden %.1f dB, at least %.1f asked for\n", found, arguments.least_sqnr_db);
    return found >= arguments.least_sqnr_db ? 0 : 5;
}

// Runs a program's body; an error is one line, and exit code 4.
template <typename Body>
int guarded(int argc, char** argv, Body body) {
    try {
        const Arguments arguments = parse(argc, argv);
        return report(arguments, body(arguments));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 4;
    }
}

}  // namespace dualtoken
