// The bounds of a model, stated once: the engine computes within them, and the converter makes no file outside of them.
// No product of two below overflows.
#pragma once
#include <cstdint>

namespace qn {

constexpr int64_t kMaxLayers = 512;
constexpr int64_t kMaxVocab = 1 << 22;
constexpr int64_t kMaxContext = 1 << 24;
constexpr int64_t kMaxEndTokens = 64;
constexpr int64_t kMinWidth = 32, kMaxWidth = 65536, kWidthMultiple = 32;       // of the stream, of an expert, of the shared expert
constexpr int64_t kMaxHeads = 1024;                                             // of any kind
constexpr int64_t kMinHeadDim = 32, kMaxHeadDim = 1024, kHeadDimMultiple = 32;  // of any kind
constexpr int64_t kMinRotaryDim = 2, kRotaryDimMultiple = 2;                    // at most the head's dim
constexpr int64_t kConv = 4;
constexpr int64_t kMaxExperts = 65536, kMaxChosen = 256;
constexpr int64_t kMaxExpertRecords = 1 << 20;                                  // experts * layers
constexpr int64_t kMaxProjectionRows = 1 << 20;                                 // of what a layer projects its input to, in one matrix
constexpr double kMinRopeTheta = 1.0001, kMaxRopeTheta = 1e12;
constexpr double kMaxYarnFactor = 4096;                                         // from 1
constexpr int64_t kMaxYarnContext = 1 << 28;                                    // the context it stretches

}  // namespace qn
