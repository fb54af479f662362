#!/bin/sh
# Mutants of every kind of file against its parser, the converter and the engine.   usage: fuzz.sh BUILD COUNT
# COUNT mutants of each kind (a tenth for the programs and the engine, which do more with each), under whatever sanitizers BUILD has.
# Any signal, sanitizer report, foreign exception, case above 10 s or 1.5 GiB ends with code 1 and the mutant's number.
set -e
build=$(cd "$1" && pwd) n=$2
data=$(cd "$(dirname "$0")/data" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
fewer=$((n / 10 + 1))
quiet() { "$@" 2>"$tmp/log" || { cat "$tmp/log"; exit 1; }; }
quiet "$build/qnext-convert" "$data/tiny" -o "$tmp/int4.qn" --experts int4 --rest int8
quiet "$build/qnext-convert" "$data/tiny-fp8" -o "$tmp/bf16.qn" --experts bf16 --no-mtp
quiet "$build/qnext-convert" --tokenizer-only "$build/data/stories" -o "$tmp/tokenizer.qn"
# A checkpoint with words: few weights, every kind of JSON file.
mkdir "$tmp/words"
cp "$data/tiny/config.json" "$data/tiny/model.safetensors" "$tmp/words"
for f in tokenizer tokenizer_config generation_config; do cp "$build/data/stories/$f.json" "$tmp/words"; done
fuzz() { "$build/qnext-fuzz" --count "$@"; }
fuzz "$n" json "$data/tiny-fp8/config.json" "$build/data/stories/tokenizer.json" "$build/data/stories/model.safetensors.index.json"
fuzz "$n" tokenizer "$tmp/tokenizer.qn"
fuzz "$n" tokenizer-json "$tmp/words/tokenizer.json"
fuzz "$n" safetensors "$data/tiny/expected-0.safetensors" "$data/tiny/model.safetensors"
fuzz "$n" qn "$tmp/tokenizer.qn" "$tmp/int4.qn"
fuzz "$n" qn-repaired "$tmp/tokenizer.qn" "$tmp/int4.qn" "$tmp/bf16.qn"
fuzz "$fewer" engine "$tmp/int4.qn" "$tmp/bf16.qn"
fuzz "$fewer" quantize "$tmp/int4.qn" "$tmp/bf16.qn"
fuzz "$fewer" convert "$data/tiny" "$data/tiny-fp8" "$tmp/words"
