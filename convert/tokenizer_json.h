// Reads the tokenizer.json of a checkpoint (Hugging Face "fast" tokenizers).
#pragma once
#include <string>

#include "ggml-lite/text/tokenizer.h"

namespace qn {

// Throws Error when the file describes anything but the byte-level BPE that text/tokenizer implements (model-spec 7.1): a different
// tokenizer would give wrong ids without a word. What is returned is known to make a Tokenizer.
TokenizerData read_tokenizer(const std::string& folder);

}  // namespace qn
