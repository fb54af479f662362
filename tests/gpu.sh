#!/bin/sh
# Builds, tests and measures on a machine with a GPU, and ends in a short table. Exit code 1 when anything failed; what cannot run
# here is SKIPPED and says why.
# usage: tests/gpu.sh [--only LIST] [--bin FOLDER] [--out FOLDER] [--memory FOLDER] [--model FILE.qn] [--device WHERE]
#   --only     parts, of: ops,check,sanitize,stories,fault,80b,80b-int8,offload,guess (default: all but the last three)
#   --bin      programs that are built already; nothing is built then
#   --out      where logs, charts and the build go (default: build-gpu)
#   --memory   where the 46 GB of the 80b parts go (default: /dev/shm)
#   --model    a file of the 80b part made before: used as it is, and kept
#   --device   default: cuda
cd "$(dirname "$0")/.." || exit 1
only=ops,check,sanitize,stories,fault,80b bin= out=build-gpu memory=/dev/shm model= device=cuda
while [ $# -gt 1 ]; do
  case $1 in
    --only) only=$2 ;; --bin) bin=$2 ;; --out) out=$2 ;; --memory) memory=$2 ;; --model) model=$2 ;; --device) device=$2 ;;
    *) break ;;
  esac
  shift 2
done
[ $# = 0 ] || { sed -n '4,10s/^# //p' tests/gpu.sh >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
data=$PWD/tests/data work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"; [ -z "$made" ] || rm -f "$made"' EXIT
trap 'exit 130' INT TERM HUP
made= failed=0
: >"$out/table"

row() {  # STATUS WHAT RESULT
  printf '%-8s %-34s %s\n' "$1" "$2" "$3" | tee -a "$out/table"
  [ "$1" != FAILED ] || failed=1
}
judge() { if [ "$1" = 0 ]; then row ok "$2" "$3"; else row FAILED "$2" "$3"; fi; }  # EXIT-CODE WHAT RESULT
holds() { awk "BEGIN { exit !($1) }"; }  # an expression of numbers; false when one is missing
wanted() { case ",$only," in *",$1,"*) echo "--- $1"; return 0 ;; esac; return 1; }
now() { date +%s.%N; }
since() { awk "BEGIN { printf \"%.1f s\", $(now) - $1 }"; }
member() { sed -n "s/.*\"$1\":\\([-+0-9.e]*\\).*/\\1/p" "$2" | awk '{ v = $1 } END { if (NR) printf "%.7g", v }'; }  # KEY of a JSON report

# ---- the machine and the programs
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU, or no nvidia-smi"
if [ -z "$bin" ]; then
  [ "$capability" != 90 ] || capability=90a
  start=$(now)
  { cmake -S . -B "$out" -DQNEXT_CUDA=ON -DQNEXT_ARCH="${QNEXT_ARCH:-$capability}" &&
    cmake --build "$out" -j "$(nproc)" --target qnext-cli qnext-convert qnext-perplexity qnext-bench qnext-tests qnext-fault; } >"$out/build.log" 2>&1
  code=$?
  judge $code "build" "$(since "$start"), $out/build.log"
  [ $code = 0 ] || { tail -n 20 "$out/build.log"; echo "needs cmake, a C++ compiler, nvcc, and the headers of CLI11 and doctest (make deps)" >&2; exit 1; }
  bin=$out
fi
bin=$(cd "$bin" && pwd) || exit 1
if ldd "$bin/qnext-cli" | grep -q 'libcublas.*not found'; then  # built elsewhere
  lib=$(find /usr/local /opt /usr/lib -name 'libcublas.so.13' 2>/dev/null | head -n 1)
  LD_LIBRARY_PATH=$(dirname "$lib"):$LD_LIBRARY_PATH
  export LD_LIBRARY_PATH
fi
"$bin/qnext-cli" --list-devices || exit 1

convert() { "$bin/qnext-convert" "$@" >>"$out/convert.log" 2>&1; }
perplexity() { "$bin/qnext-perplexity" --device "$device" --json "$@" 2>>"$out/perplexity.log"; }
stories=$work/stories  # the folder, and beside it what is made of it
need_stories() {
  [ ! -f "$stories.qn" ] || return 0
  (cd "$work" && { tar xJf "$data/stories.tar.xz" || cmake -E tar xJf "$data/stories.tar.xz" || python3 -m tarfile -e "$data/stories.tar.xz"; }) 2>>"$out/convert.log" &&
    convert "$stories" -o "$stories.qn" --experts bf16 --rest bf16 && convert "$stories" -o "$stories-int4.qn" --experts int4 --rest bf16
}
need_tiny() {
  [ ! -f "$work/tiny.qn" ] || return 0
  mkdir "$work/tiny-yarn" && cp "$data"/tiny-yarn/* "$data/tiny/model.safetensors" "$work/tiny-yarn" || return 1
  for folder in "$data/tiny" "$work/tiny-yarn" "$data/tiny-fp8"; do
    convert "$folder" -o "$work/$(basename "$folder").qn" --experts bf16 --rest bf16 || return 1
  done
}

# ---- the tests that need a GPU: the table of operations, recordings, sampling, loading
if wanted ops; then
  start=$(now)
  "$bin/qnext-tests" --test-case='CUDA*' >"$out/tests.log" 2>&1
  code=$?
  [ $code = 0 ] || tail -n 60 "$out/tests.log"
  skipped=$(grep -c 'SKIPPED: no GPU$' "$out/tests.log")
  if [ "$skipped" -gt 0 ]; then row SKIPPED "GPU tests" "$skipped: no GPU"
  else judge $code "GPU tests" "$(sed -n 's/.*test cases: *//p' "$out/tests.log"), $(sed -n 's/.*MESSAGE: \([0-9]* cases\) on.*/\1/p' "$out/tests.log") of the table, $(since "$start")"; fi
fi

# ---- against the reference implementation. BF16 activations alone cost KL 0.021 and leave 93.9 % of tiny/expected-1 (emulated).
if wanted check; then
  if need_tiny; then
    for pair in tiny/expected-0 tiny/expected-1 tiny-yarn/expected-0 tiny-fp8/expected-0; do
      log=$out/check-$(echo $pair | tr / -)
      perplexity -m "$work/${pair%/*}.qn" --check "$data/$pair.safetensors" --act f32 >"$log-f32.json"
      judge $? "$pair, f32" "max |d logit| $(member logits_max_d "$log-f32.json"), MTP $(member mtp_max_d "$log-f32.json")"
      perplexity -m "$work/${pair%/*}.qn" --check "$data/$pair.safetensors" --act bf16 >"$log-bf16.json"
      kl=$(member logits_kl_mean "$log-bf16.json") top=$(member logits_top1_percent "$log-bf16.json")
      most=0.06 least=90
      [ $pair != tiny/expected-1 ] || most=0.03 least=93
      holds "${kl:-9} <= $most && ${top:-0} >= $least"
      judge $? "$pair, bf16" "KL $kl (at most $most), top-1 $top % (at least $least)"
    done
  else row FAILED "tiny models" "$out/convert.log"; fi
fi

# ---- compute-sanitizer
if wanted sanitize; then
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$sanitizer" ]; then row SKIPPED "compute-sanitizer" "not installed"
  elif need_tiny && need_stories; then
    for tool in memcheck racecheck; do
      for act in bf16 int8 f32; do
        start=$(now)
        timeout 300 "$sanitizer" --tool $tool --error-exitcode 9 "$bin/qnext-perplexity" --device "$device" --act $act -m "$work/tiny.qn" \
          --check "$data/tiny/expected-0.safetensors" >"$out/$tool-$act.log" 2>&1
        code=$?
        judge $code "$tool, tiny, $act" "$(sed -n 's/^=* *\(ERROR SUMMARY\|RACECHECK SUMMARY\)/\1/p' "$out/$tool-$act.log" | tail -n 1), $(since "$start")"
        [ $code = 0 ] || head -n 40 "$out/$tool-$act.log"
      done
      start=$(now)
      timeout 300 "$sanitizer" --tool $tool --error-exitcode 9 "$bin/qnext-perplexity" --device "$device" --kv-type int8 -m "$work/tiny.qn" \
        --check "$data/tiny/expected-0.safetensors" >"$out/$tool-kv8.log" 2>&1
      code=$?
      judge $code "$tool, tiny, INT8 cache" "$(sed -n 's/^=* *\(ERROR SUMMARY\|RACECHECK SUMMARY\)/\1/p' "$out/$tool-kv8.log" | tail -n 1), $(since "$start")"
      [ $code = 0 ] || head -n 40 "$out/$tool-kv8.log"
      start=$(now)  # sampling on the device
      timeout 300 "$sanitizer" --tool $tool --error-exitcode 9 "$bin/qnext-cli" --device "$device" -m "$stories-int4.qn" -p "What is 2 plus 3?" -n 8 --seed 1 \
        >"$out/$tool-cli.log" 2>&1
      code=$?
      judge $code "$tool, stories int4, qnext-cli" "$(sed -n 's/^=* *\(ERROR SUMMARY\|RACECHECK SUMMARY\)/\1/p' "$out/$tool-cli.log" | tail -n 1), $(since "$start")"
      [ $code = 0 ] || head -n 40 "$out/$tool-cli.log"
    done
  else row FAILED "test models" "$out/convert.log"; fi
fi

# ---- the trained model: emulated BF16 activations cost 0.017 % of perplexity and KL 3.8e-5
if wanted stories; then
  expected=$stories/expected.safetensors
  if need_stories; then
    perplexity -m "$stories.qn" --check "$expected" >"$out/stories.json"
    judge $? "stories bf16, --check" "perplexity $(member ppl "$out/stories.json"), $(member ppl_percent "$out/stories.json") % off (at most 0.1)"
    perplexity -m "$stories.qn" --act f32 --check "$expected" >"$out/stories-f32.json"
    judge $? "stories f32, --check" "perplexity $(member ppl "$out/stories-f32.json"), max |d nll| $(member nll_max_d "$out/stories-f32.json")"
    whole=$(member ppl "$out/stories.json")
    for pieces in 211 1; do
      perplexity -m "$stories.qn" --ubatch $pieces --check "$expected" >"$out/stories-pieces.json"
      here=$(member ppl "$out/stories-pieces.json")
      holds "${here:-9} / ${whole:-1} - 1 <= 0.001 && ${here:-0} / ${whole:-1} - 1 >= -0.001"
      judge $? "stories bf16, in pieces of $pieces" "perplexity $here, in one piece $whole (within 0.1 %)"
    done
    perplexity -m "$stories.qn" --against "$stories.qn" --against-device cpu --against-act f32 --check "$expected" >"$out/stories-kl.json"
    kl=$(member kl_mean "$out/stories-kl.json")
    holds "${kl:-9} <= 1e-4"
    judge $? "stories bf16 against CPU f32" "KL $kl (at most 1e-4), top-1 $(member top1_percent "$out/stories-kl.json") %"
    perplexity -m "$stories.qn" --kv-type int8 --check "$expected" --against "$stories.qn" --against-device cpu --against-act f32 --against-kv-type f32 >"$out/stories-kv8.json"
    here=$(member ppl "$out/stories-kv8.json") there=$(member reference_ppl "$out/stories-kv8.json")
    holds "${here:-9} / ${there:-1} - 1 <= 0.0005 && ${here:-0} / ${there:-1} - 1 >= -0.0005"
    judge $? "stories bf16, INT8 cache, against CPU" "perplexity $here, there $there (within 0.05 %), KL $(member kl_mean "$out/stories-kv8.json")"
    perplexity -m "$stories-int4.qn" --against "$stories-int4.qn" --against-device cpu --against-act f32 --check "$expected" >"$out/stories-int4.json"
    here=$(member ppl "$out/stories-int4.json") there=$(member reference_ppl "$out/stories-int4.json")
    holds "${here:-9} / ${there:-1} - 1 <= 0.002 && ${here:-0} / ${there:-1} - 1 >= -0.002"
    judge $? "stories int4 against CPU" "perplexity $here, there $there (within 0.2 %)"
    "$bin/qnext-cli" --device "$device" -m "$stories.qn" --temp 0 -p "Tell me a story about Lily and a drum." >"$out/answer" 2>"$out/answer.log"
    code=$?
    "$bin/qnext-cli" --device "$device" -m "$stories.qn" --temp 0 -p "Tell me a story about Lily and a drum." --no-graph 2>>"$out/answer.log" | cmp -s - "$out/answer"
    judge $(($? + code)) "stories, with and without graph" "$(head -c 60 "$out/answer" | tr '\n' ' ')..."
  else row FAILED "stories" "$out/convert.log"; fi
fi

# ---- a GPU that fails in the midst of an answer: one line that names it, exit code 1, and no hanging, wherever the experts are
if wanted fault; then
  if [ ! -f "$bin/libqnext-fault.so" ]; then row SKIPPED "fault" "no libqnext-fault.so in $bin"
  elif need_stories; then
    broken=$(echo "${device#cuda}" | sed 's/.*[:,]//')
    for slots in all 8; do
      : >"$out/fault-answer"
      set --
      [ $slots = all ] || set -- --slots $slots
      timeout 120 env QNEXT_FAULT="${broken:-0}:$out/fault-answer" LD_PRELOAD="$bin/libqnext-fault.so" "$bin/qnext-cli" --device "$device" \
        -m "${model:-$stories-int4.qn}" --raw -p "Once upon a time" -n 4096 --temp 0 "$@" >"$out/fault-answer" 2>"$out/fault.log"
      code=$?
      line=$(grep '^qnext-cli: ' "$out/fault.log")
      [ $code = 1 ] && [ "$(grep -c '^fault: trap' "$out/fault.log")" = 1 ] && [ "$(echo "$line" | wc -l)" = 1 ] && echo "$line" | grep -q "cuda:${broken:-0} "
      judge $? "fault, experts on the GPU: $slots" "exit $code, $line"
    done
  else row FAILED "stories" "$out/convert.log"; fi
fi

needed=$((46 * 1000 * 1000))  # kB, for a file of the 80B model
room() { df -Pk "$memory" | awk 'NR == 2 { print $4 }'; }
cell() { awk -F'|' -v test="$2" -v n="$3" '{ gsub(/^ +| +$/, "", $7) } $7 == test { gsub(/^ +/, "", $n); print $n + 0 }' "$1"; }  # FILE TEST COLUMN
no_room() { row SKIPPED "$1" "needs 46 GB in $memory, $(($(room) / 1000000)) GB are free (as root: mount -o remount,size=60G $memory)"; }

synthetic() {  # REST: makes $made, in place of the one before
  [ -z "$made" ] || rm -f "$made"
  made=
  if [ "$(room)" -lt $needed ]; then no_room "80b, $1 rest"; return 1; fi
  if [ ! -d "$work/tokenizer" ]; then
    mkdir "$work/tokenizer" && cp "$data/tokenizer_config.json" "$work/tokenizer" &&
      { xz -dc "$data/tokenizer.json.xz" || python3 -c 'import lzma,sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' "$data/tokenizer.json.xz"; } \
        >"$work/tokenizer/tokenizer.json" 2>/dev/null
  fi
  made=$memory/qnext-gpu-$1-$$.qn
  start=$(now)
  "$bin/qnext-convert" --synthetic qwen3-next-80b-a3b --experts int4 --rest "$1" --tokenizer "$work/tokenizer" -o "$made" >"$out/80b-$1-convert.log" 2>&1
  code=$?
  judge $code "80b, $1 rest, generated" "$(since "$start") with $(nproc) cores (at most 120 s with 16)"
  [ $code = 0 ] || tail -n 5 "$out/80b-$1-convert.log"
  return $code
}

# ---- the shapes of the 80B model, random weights: 48 layers and the MTP layer
if wanted 80b; then
  if [ -n "$model" ]; then [ -f "$model" ] || row FAILED "80b" "no file $model"
  elif synthetic bf16; then model=$made
  fi
  if [ -f "$model" ]; then
    start=$(now)
    "$bin/qnext-cli" --device "$device" -m "$model" -p "Once upon a time" -n 64 --temp 0 -v >"$out/80b-cli.log" 2>&1
    judge $? "80b, qnext-cli, 64 tokens" "$(since "$start") with loading"
    tail -n 3 "$out/80b-cli.log" | cut -c 1-200
    "$bin/qnext-bench" --device "$device" -m "$model" -p 512,2048,8192 -n 128 -d 0,4096,32768 -r 3 --ops 1 --verify 1,2,4,8 --plot "$out/80b.png" >"$out/80b-bench.md" 2>"$out/80b-bench.log"
    code=$?
    cat "$out/80b-bench.md" "$out/80b-bench.log"
    judge $code "80b, qnext-bench" "$(sed -n 's/^ *load  *//p' "$out/80b-bench.md" | head -n 1)"
    if [ $code = 0 ]; then
      decode=$(cell "$out/80b-bench.md" "tg128 @ d4096" 8) share=$(cell "$out/80b-bench.md" "tg128 @ d4096" 12) prefill=$(cell "$out/80b-bench.md" pp8192 8)
      holds "${decode:-0} >= 350 && ${share:-0} >= 60"
      judge $? "80b decode at depth 4096" "$decode tok/s (at least 350), $share % of the roofline (at least 60)"
      plan=$(sed -n 's/.*VRAM in use .*, \([-+0-9.]*\) % against the plan.*/\1/p' "$out/80b-bench.md" | head -n 1)
      holds "${plan:-9} <= 2 && ${plan:-9} >= -2"
      judge $? "80b VRAM" "$plan % against the plan (within 2 %)"
      holds "${prefill:-0} >= 3000"
      judge $? "80b prefill of 8192" "$prefill tok/s (at least 3000)"
    fi
  fi
fi

# ---- the same with INT8 rest: decode by the format of the cache, and passes over 1, 2, 4 and 8 tokens
if wanted 80b-int8; then
  if synthetic int8; then
    for kv in bf16:4096,32768 int8:4096,32768,131072,262000; do
      log=$out/80b-int8-kv-${kv%%:*}
      "$bin/qnext-bench" --device "$device" -m "$made" --kv-type ${kv%%:*} -p 0 -n 128 -d ${kv#*:} -r 2 --verify 1,2,4,8 --ops 1 >"$log.md" 2>"$log.log"
      code=$?
      cat "$log.md" "$log.log"
      judge $code "80b, INT8 rest, ${kv%%:*} cache" "$(awk -F'|' '$7 ~ /tg/ { gsub(/ +/, " "); sub(/.*d/, "", $7); sub(/ ±.*/, "", $8); printf "%sd%s%s tok/s,%s%%", sep, $7, $8, $12; sep = "; " }' "$log.md")"
    done
  fi
fi

bench() {  # LOG ...: of $made
  log=$out/$1
  shift
  "$bin/qnext-bench" -m "$made" "$@" >"$log.md" 2>"$log.log"
  code=$?
  cat "$log.md" "$log.log"
}

# ---- experts in RAM beside a part of the GPU: decode against what the bandwidths allow, and both against what --plan expected; layers on several
# logical devices of one GPU: the same tokens, as fast; the CPU alone
if wanted offload; then
  near() { holds "${1:-0} / ${2:-1} <= 1.25 && ${1:-0} / ${2:-1} >= 0.75"; }  # EXPECTED MEASURED
  for rest in bf16 int8; do
    synthetic $rest || continue
    for vram in 24G 16G 12G 8G; do
      [ $rest = int8 ] || [ $vram = 24G ] || continue
      bench "offload-$rest-$vram" --device "$device" --vram $vram -p 0 -n 192 -d 4096 -r 2 --no-draft
      decode=$(cell "$log.md" "tg192 @ d4096" 8) expected=$(sed -n 's/.*--plan expects \([0-9.]*\) tok.*/\1/p' "$log.md")
      share=$(sed -n 's/.*tg192 @ d4096, \([0-9]*\) % of that.*/\1/p' "$log.md") bound=$(sed -n 's/.*nothing waiting \([0-9.]*\) tok.*/\1/p' "$log.md")
      [ $code = 0 ] && near "$expected" "$decode" && { [ $vram != 24G ] || holds "${share:-0} >= 70"; }
      judge $? "$rest rest beside $vram, decode" "$decode tok/s, ${share:-?} % of $bound (of 24G at least 70); --plan $expected (within 25 %)"
      bench "offload-$rest-$vram-prompts" --device "$device" --vram $vram -p 2048,8192 -n 0 -r 1 --no-draft
      for prompt in 2048 8192; do
        prefill=$(cell "$log.md" pp$prompt 8) expected=$(sed -n "s/.*--plan expects.* of $prompt at \([0-9.]*\).*/\1/p" "$log.md")
        [ $code = 0 ] && near "$expected" "$prefill"
        judge $? "$rest rest beside $vram, prompt of $prompt" "$prefill tok/s; --plan $expected (within 25 %)"
      done
    done
  done
  if [ -f "$made" ]; then  # the last one, INT8 rest
    one= text=
    for where in cuda:0 cuda:0,0 cuda:0,0,0; do
      bench "split-$(echo $where | tr :, --)" --device $where -p 0 -n 128 -d 4096 -r 2 --no-draft
      here=$("$bin/qnext-cli" --device $where -m "$made" --raw -p "Once upon a time" -n 64 --temp 0 2>>"$out/split.log") || code=1
      decode=$(cell "$log.md" "tg128 @ d4096" 8)
      one=${one:-$decode} text=${text:-$here}
      [ $code = 0 ] && [ -n "$here" ] && [ "$here" = "$text" ] && holds "${decode:-0} / ${one:-1} >= 0.95"
      judge $? "int8 rest on $where" "$decode tok/s (at least 95 % of one device), text $(echo "$here" | cksum)"
    done
    bench split-vram --device cuda:0,0 --vram 14G,14G -p 0 -n 64 -d 4096 -r 1 --no-draft
    judge $code "int8 rest on cuda:0,0 with 14G each" "$(cell "$log.md" "tg64 @ d4096" 8) tok/s"
    bench cpu --device cpu -p 512 -n 32 -r 1 --no-draft
    judge $code "int8 rest, the CPU alone" "$(cell "$log.md" tg32 8) tok/s, $(cell "$log.md" tg32 12) % of the roofline, prompt of 512 $(cell "$log.md" pp512 8) tok/s"
  fi
fi

# ---- guessing ahead, by lottery
if wanted guess; then
  for rest in bf16 int8; do
    synthetic $rest || continue
    bench "guess-$rest" --device "$device" -p 0 -n 384 -d 4096 -r 1 --simulate-acceptance 0.2,0.7,0.8 --draft 3
    speed() { awk -F'|' -v right="$1" -v n="$2" '$2 + 0 == right && $3 ~ " " n " *$" { print $6 + 0 }' "$log.md"; }  # RIGHT GUESSES
    holds "$(speed 0.2 auto) >= 0.98" && [ $code = 0 ]
    judge $? "$rest rest, guesses" "auto $(speed 0.2 auto) of plain steps (2 in 10 right, at least 0.98), $(speed 0.7 auto) (7), $(speed 0.8 auto) (8); 3: $(speed 0.7 3), $(speed 0.8 3)"
  done
fi

echo
echo "--- $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1), logs in $out"
cat "$out/table"
exit $failed
