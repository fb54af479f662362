// make_sparse FOLDER [LAYERS]: a checkpoint of real shapes whose data are holes (zeros that take no disk), for measuring the
// converter's memory:
//   make_sparse FOLDER && /usr/bin/time -v ./qnext-convert FOLDER -o sparse.qn    # "Maximum resident set size"
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "convert/names.h"
#include "convert/synthetic.h"

int main(int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return std::fprintf(stderr, "usage: make_sparse FOLDER [LAYERS]\n"), 2;
  const std::filesystem::path folder = argv[1];
  const int layers = argc > 2 ? std::atoi(argv[2]) : 4;
  try {
    std::filesystem::create_directories(folder);
    std::ofstream(folder / "config.json")
        << "{\"model_type\": \"qwen3_next\", \"hidden_size\": 2048, \"num_hidden_layers\": " << layers
        << ", \"vocab_size\": 151936, \"max_position_embeddings\": 262144, \"rope_theta\": 10000000, \"num_attention_heads\": 16, "
           "\"num_key_value_heads\": 2, \"head_dim\": 256, \"linear_num_key_heads\": 16, \"linear_num_value_heads\": 32, "
           "\"linear_key_head_dim\": 128, \"linear_value_head_dim\": 128, \"num_experts\": 512, \"num_experts_per_tok\": 10, "
           "\"moe_intermediate_size\": 512, \"shared_expert_intermediate_size\": 512, \"eos_token_id\": 151645}";
    std::string header;
    uint64_t end = 0;
    qn::for_each_source(qn::model_layout(qn::synthetic_config("qwen3-next-80b-a3b", layers), {}), [&](const qn::SourceTensor& s) {
      std::string shape;
      uint64_t bytes = 2;
      for (const int64_t n : s.shape) shape += (shape.empty() ? "" : ",") + std::to_string(n), bytes *= static_cast<uint64_t>(n);
      header += (header.empty() ? "{\"" : ",\"") + s.name + "\":{\"dtype\":\"BF16\",\"shape\":[" + shape + "],\"data_offsets\":[" +
                std::to_string(end) + "," + std::to_string(end + bytes) + "]}";
      end += bytes;
    });
    header += "}";
    const uint64_t n = header.size();  // little-endian machines only
    std::ofstream(folder / "model.safetensors", std::ios::binary).write(reinterpret_cast<const char*>(&n), 8) << header;
    std::filesystem::resize_file(folder / "model.safetensors", 8 + n + end);
    return 0;
  } catch (const std::exception& e) {
    return std::fprintf(stderr, "make_sparse: %s\n", e.what()), 1;
  }
}
