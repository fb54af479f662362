#!/bin/sh
# The programs as a user meets them: exit codes, one-line errors, what goes to stdout, conversations by pipe.
# usage: cli.sh FOLDER-OF-PROGRAMS STORIES   (STORIES: the trained test model, a Hugging Face folder or a .qn file)
bin=$(cd "$1" && pwd) || exit 1
stories=$2
data=$(cd "$(dirname "$0")/data" && pwd) || exit 1
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
cli=$bin/qnext-cli
tests=0 bad=0

fault() { echo "FAILED: $*"; bad=$((bad + 1)); }
same() { tests=$((tests + 1)); [ "$2" = "$3" ] || fault "$1: expected [$2], got [$3]"; }
differ() { tests=$((tests + 1)); [ "$2" != "$3" ] || fault "$1: got [$2] twice"; }
has() { tests=$((tests + 1)); grep -q -e "$2" "$3" || fault "$1: no /$2/ in: $(cat "$3")"; }
lacks() { tests=$((tests + 1)); ! grep -q -e "$2" "$3" || fault "$1: /$2/ in: $(cat "$3")"; }
# refused CODE PATTERN COMMAND...: exit code, nothing on stdout, exactly one line on stderr, which names the program
refused() {
  code=$1 pattern=$2
  shift 2
  "$@" >"$tmp/out" 2>"$tmp/err" </dev/null
  same "exit code of $*" "$code" $?
  same "stdout of $*" "" "$(cat "$tmp/out")"
  same "lines on stderr of $*" 1 "$(wc -l <"$tmp/err" | tr -d ' ')"
  has "stderr of $*" "^$(basename "$1"): .*$pattern" "$tmp/err"
}

m=$tmp/stories.qn
if [ -d "$stories" ]; then
  "$bin/qnext-convert" "$stories" -o "$m" >"$tmp/log" 2>&1 || { cat "$tmp/log"; exit 1; }
else
  cp "$stories" "$m" || exit 1
fi
say() { "$cli" -m "$m" --temp 0 "$@" 2>"$tmp/err" </dev/null; }
question="What is 2 plus 3?"

# ---- bad usage: 2, bad input: 1
refused 2 "required" "$cli" -p x
refused 2 "bogus" "$cli" -m "$m" --bogus
refused 2 "extra" "$cli" -m "$m" -p x extra
refused 2 "excludes" "$cli" -m "$m" -p x -f y
refused 2 "excludes" "$cli" -m "$m" --raw --system x -p y
refused 2 "excludes" "$cli" -m "$m" --chat -p x
refused 2 "temp.*number.*abc" "$cli" -m "$m" -p x --temp abc
refused 2 "top-p.*7" "$cli" -m "$m" -p x --top-p 7
refused 2 "seed" "$cli" -m "$m" -p x --seed -1
refused 2 "stop.*empty" "$cli" -m "$m" -p x --stop ""
refused 2 "excludes" "$cli" -m "$m" --info --plan
refused 1 "empty one" "$cli" -m "$m" -f ""
for value in nan inf -1; do
  refused 2 "bandwidth.*$value" "$bin/qnext-bench" -m "$m" --bandwidth $value
  refused 2 "tol.*$value" "$bin/qnext-perplexity" -m "$m" -f "$0" --tol $value
done
refused 2 "tokens" "$cli" -m "$m" -p x -n -5
refused 2 "threads.*0" "$cli" -m "$m" -p x --threads 0
refused 2 "draft.*8" "$cli" -m "$m" -p x --draft 8
refused 2 "draft.*fast" "$cli" -m "$m" -p x --draft fast
refused 2 "ram.*24X" "$cli" -m "$m" -p x --ram 24X
refused 2 "act.*f64" "$cli" -m "$m" -p x --act f64
refused 1 "none.qn" "$cli" -m "$tmp/none.qn" -p x
refused 1 "none.txt" "$cli" -m "$m" -f "$tmp/none.txt"
refused 1 "none.json" "$cli" -m "$m" --tools "$tmp/none.json" -p x
refused 2 "device" "$cli" -m "$m" --device tpu -p x
refused 2 "device" "$cli" -m "$m" --device cuda:0, -p x
"$cli" -m "$m" --device cpu,cpu --split 5,3 --info >"$tmp/out" 2>"$tmp/err" </dev/null
has "--info of two devices" "^layers 0 to 4 .*cpu (.*weights" "$tmp/out"
has "--info of two devices" "^layers 5 to 7 " "$tmp/out"
refused 2 "device" "$cli" -m "$m" --device cpu,ref -p x
refused 2 "split" "$cli" -m "$m" --device cpu,cpu --split 4, -p x
refused 1 "expected 2 numbers" "$cli" -m "$m" --device cpu,cpu --split 8 -p x
refused 1 "add up to the 8 layers" "$cli" -m "$m" --device cpu,cpu --split 4,5 -p x
refused 1 "empty" "$cli" -m "$m" -p ""
refused 1 "empty" "$cli" -m "$m"
refused 2 "from 1 to" "$cli" -m "$m" --rope-yarn 0.5 -p x
refused 2 "rope-yarn" "$cli" -m "$m" --rope-yarn 4x -p x
refused 1 "ctx" "$cli" -m "$m" --ctx 8 -p "A prompt that is certainly longer than eight tokens, is it not?"
refused 1 "array" "$cli" -m "$m" --tools "$stories/config.json" -p x
head -c 100000 "$m" >"$tmp/short.qn"
refused 1 "short.qn" "$cli" -m "$tmp/short.qn" -p x
echo '{"text": 3}' >"$tmp/bad.jsonl"
"$cli" -m "$m" --tokenize <"$tmp/bad.jsonl" >"$tmp/out" 2>"$tmp/err"
same "exit code of a bad line" 1 $?
has "a bad line" "^qnext-cli: .*line 1" "$tmp/err"
refused 2 "required" "$bin/qnext-perplexity" -m "$m"
refused 2 "stride" "$bin/qnext-perplexity" -m "$m" -f x --window 64 --stride 65
refused 1 "none.txt" "$bin/qnext-perplexity" -m "$m" -f "$tmp/none.txt"
"$cli" --help >"$tmp/out" && has "help" "--min-p" "$tmp/out" && has "help" "--threads" "$tmp/out"
same "version" "qnext-cli" "$("$cli" --version | cut -d ' ' -f 1)"
refused 2 "required" "$bin/qnext-bench"
refused 2 "8-4" "$bin/qnext-bench" -m "$m" -p 8-4
refused 1 "ctx gives 100" "$bin/qnext-bench" -m "$m" --device cpu --ctx 100
"$bin/qnext-bench" -m "$m" --device cpu -p 8 -n 4 -d 0,64 -r 1 --ops 1,3 --verify 2,4 -o jsonl --plot "$tmp/x.png" >"$tmp/json" 2>"$tmp/err"
code=$?
same "exit code of qnext-bench ($(cat "$tmp/err"))" 0 $code
has "bench" '"test":"tg4 @ d64"' "$tmp/json"
has "bench --verify: one token, for the ratios" '"test":"verify1 @ d64".*"time_ratio":1.0,"bytes_ratio":1.0,' "$tmp/json"
has "bench --verify" '"test":"verify4 @ d64".*"time_ratio":[0-9].*"bytes_ratio":[1-3][.]' "$tmp/json"  # 4 tokens share weights
printf 'Once upon a time there was a young cat' >"$tmp/begin"
prompt=$(printf '{"text":"%s"}\n' "$(cat "$tmp/begin")" | "$cli" -m "$m" --tokenize | tr -cd , | wc -c | tr -d ' ')  # its tokens, but for one
"$bin/qnext-bench" -m "$m" --device cpu -f "$tmp/begin" -p 0 -n 32 -d $((prompt + 1)) -r 2 -o jsonl >"$tmp/made" 2>"$tmp/err"
same "what qnext-bench times is what qnext-cli says" "$(say --device cpu --raw -p "$(cat "$tmp/begin")" -n 32 --json | sed 's/.*"text":\("[^"]*"\).*/\1/')" \
  "$(sed 's/.*"ids":\(\[[^]]*\]\).*/{"ids":\1}/' "$tmp/made" | "$cli" -m "$m" --detokenize | sed 's/.*"text":\("[^"]*"\).*/\1/')"
"$bin/qnext-bench" -m "$m" --device cpu -p 0 -n 24 -r 1 --draft 2 --simulate-acceptance 0.8 -o jsonl >"$tmp/json" 2>"$tmp/err"
same "exit code of --simulate-acceptance ($(cat "$tmp/err"))" 0 $?
has "bench --simulate-acceptance" '"test":"draft 2, 0.8 right".*"tokens_per_step":[12][.].*"speed_up":[0-9]' "$tmp/json"
has "bench --simulate-acceptance: costs" '"kind":"cost","test":"next guess"' "$tmp/json"
refused 2 "acceptance.*1.5" "$bin/qnext-bench" -m "$m" --simulate-acceptance 1.5
refused 2 "plot" "$bin/qnext-bench" -m "$m" -p 0 -n 0 --verify 2 --plot "$tmp/x.png"
"$bin/qnext-bench" -m "$m" -m "$tmp/none.qn" --device cpu -p 8 -n 0 -r 1 --passes 2 -o json >"$tmp/json" 2>"$tmp/err"
same "exit code of qnext-bench when a later model fails" 1 $?
has "bench, a later model fails" "none.qn" "$tmp/err"
same "JSON of qnext-bench when a later model fails" "]" "$(tail -n 1 "$tmp/json")"
"$bin/qnext-bench" -m "$m" -m "$tmp/none.qn" --device cpu -p 0 -n 4 -r 1 --passes 2 >"$tmp/out" 2>"$tmp/err"
has "tables of qnext-bench when a later model fails" "x time / x bytes" "$tmp/out"
"$bin/qnext-bench" -m "$m" --device cpu -p 0 -n 4,400 -r 200 -o json >"$tmp/json" 2>"$tmp/err" &
bench=$!
for i in $(seq 100); do grep -q tg4 "$tmp/json" && break; sleep 0.1; done
kill -TERM $bench
wait $bench
same "exit code of a stopped qnext-bench ($(cat "$tmp/err"))" 143 $?
same "JSON of a stopped qnext-bench" "]" "$(tail -n 1 "$tmp/json")"
has "a stopped qnext-bench" "^qnext-bench: interrupted" "$tmp/err"
cp "$m" "$tmp/own.qn" && ln -s own.qn "$tmp/own.png"
refused 1 "own.png is read by this run" "$bin/qnext-bench" -m "$tmp/own.qn" --device cpu --plot "$tmp/own.png"
same "a model named as the chart" "" "$(cmp "$m" "$tmp/own.qn" 2>&1)"
rm "$tmp/own.qn" "$tmp/own.png"
"$cli" --list-devices >"$tmp/out" && has "devices" "^ref" "$tmp/out"
"$cli" -m "$m" --device cpu,cpu --plan >"$tmp/out" 2>"$tmp/err" </dev/null
same "exit code of --plan" 0 $?
same "stderr of --plan" "" "$(cat "$tmp/err")"
for line in "layers 0 to 4: weights" "layers 5 to 7: weights" "^context  *[1-9]" "^measured  *memory of the host" "^decode  *about [1-9]" "^prefill  *about [1-9]"; do
  has "--plan" "$line" "$tmp/out"
done
"$cli" -m "$m" --device cpu,cpu --plan --json >"$tmp/out" 2>"$tmp/err" </dev/null
same "exit code of --plan --json" 0 $?
same "lines of --plan --json" 1 "$(wc -l <"$tmp/out" | tr -d ' ')"
has "--plan --json" '^{"devices":\[{"device":"cpu.*"first_layer":5,"layers":3,.*"expert_slots":0}\],"planned_context":[1-9].*"decode_tokens_per_second":[0-9.e+]*,.*}$' "$tmp/out"
"$cli" -m "$m" --info >"$tmp/out" && has "info" "^layers  *8$" "$tmp/out"

# ---- output that cannot be written: 1, and one line that says so
for command in "$cli --version" "$cli --help" "$bin/qnext-perplexity -m $m -f $0 --limit 50" "$bin/qnext-quantize $m $tmp/q.qn --rest int8"; do
  $command >/dev/full 2>"$tmp/err" </dev/null
  same "exit code of $command >/dev/full" 1 $?
  has "$command >/dev/full" "standard output: .*could not be written" "$tmp/err"
done
echo old >"$tmp/old.qn"
(ulimit -f 1000 && "$bin/qnext-quantize" "$m" "$tmp/old.qn" --rest int8 2>"$tmp/err" >"$tmp/out")
same "exit code beyond a limit of file sizes" 1 $?
has "beyond a limit of file sizes" "cannot write" "$tmp/err"
same "the file there was" old "$(cat "$tmp/old.qn")"
same "temporary files" "" "$(ls "$tmp" | grep tmp-)"
if [ "$(id -u)" != 0 ]; then
  chmod 444 "$tmp/old.qn"
  refused 1 "denied" "$bin/qnext-quantize" "$m" "$tmp/old.qn" --rest int8
  same "the write-protected file there was" old "$(cat "$tmp/old.qn")"
fi

# ---- Ctrl-C while a prompt is read that may never come
mkfifo "$tmp/fifo"
sleep 10 >"$tmp/fifo" &
writer=$!
timeout -s INT -k 3 1 "$cli" -m "$m" -f "$tmp/fifo" >"$tmp/out" 2>"$tmp/err" </dev/null
same "Ctrl-C while a prompt is read: by that signal, not the next" 124 $?
kill $writer 2>/dev/null

# ---- one answer: only its words on stdout, nothing else anywhere
answer=$(say -p "$question")
same "an answer's exit code" 0 $?
differ "an answer" "" "$answer"
same "stderr beside an answer" "" "$(cat "$tmp/err")"
say -p "$question" -v >/dev/null
has "-v" "^prompt [0-9]* tokens (0 reused).* answer [0-9]* tokens" "$tmp/err"
say -p "$question" --show-prompt >/dev/null
has "--show-prompt" "^<|im_start|>assistant" "$tmp/err"
same "a prompt by stdin" "$answer" "$(echo "$question" | "$cli" -m "$m" --temp 0)"
echo "$question" >"$tmp/question.txt"
same "a prompt from a file" "$answer" "$(say -f "$tmp/question.txt")"
same "-n 0" "" "$(say -p "$question" -n 0)"
differ "the system message is read" "$(say -p "What is 75 plus 97?" --json | sed 's/.*"prompt_tokens":\([0-9]*\).*/\1/')" \
  "$(say -p "What is 75 plus 97?" --system "You tell stories for children." --json | sed 's/.*"prompt_tokens":\([0-9]*\).*/\1/')"

# --json is valid for our strict reader (which takes its "text") and says the same
say -p "$question" --json --seed 77 >"$tmp/json"
same "lines of --json" 1 "$(wc -l <"$tmp/json" | tr -d ' ')"
"$cli" -m "$m" --tokenize <"$tmp/json" | "$cli" -m "$m" --detokenize >"$tmp/text" || fault "--json does not parse: $(cat "$tmp/json")"
same "--json and text" "{\"text\":\"$answer\"}" "$(cat "$tmp/text")"
for member in '"finish":"end"' '"seed":77' '"prompt_tokens":[1-9]' '"reused_tokens":0' '"generated_tokens":[1-9]' '"tool_calls":\[\]' '"generate_tokens_per_second":[0-9]'; do
  has "--json" "$member" "$tmp/json"
done
say -p "$question" --json -n 2 >"$tmp/json"
has "-n 2" '"finish":"length".*"generated_tokens":2' "$tmp/json"

# --stop: the text up to it, and not further
word=$(echo "$answer" | cut -d ' ' -f 3)
same "--stop" "${answer%%"$word"*}" "$(say -p "$question" --stop nowhere --stop "$word")"
say -p "$question" --stop "$word" --json >"$tmp/json"
has "--stop" '"finish":"stop"' "$tmp/json"

# guesses change nothing but the time
same "--no-draft" "$answer" "$(say -p "$question" --no-draft)"
same "--no-mmap" "$answer" "$(say -p "$question" --no-mmap)"
refused 1 "no-mmap.*may be used" "$cli" -m "$m" --device cpu --ram 2G --ctx 512 --no-mmap -p x
same "--mmap" "$answer" "$(say -p "$question" --mmap)"
story=$(say -p "Tell me a story." -n 60 --draft 3 -v)
same "--draft 3 and none" "$story" "$(say -p "Tell me a story." -n 60 --draft 0)"
say -p "Tell me a story." -n 60 --draft 3 -v >/dev/null
has "-v with guesses" "; accepted [1-9][0-9]*/[1-9][0-9]* drafts, [0-9.]* x the plain speed" "$tmp/err"
say -p "Tell me a story." -n 60 --draft 3 --json >"$tmp/json"
has "--json with guesses" '"drafted_tokens":[1-9].*"accepted_tokens":[1-9].*"plain_step_seconds":[0-9]' "$tmp/json"

# seeds
draw() { "$cli" -m "$m" -p "Tell me a story." -n 24 --temp 1.2 --top-p 1 --top-k 0 --seed "$1" </dev/null; }
one=$(draw 1)
same "one seed" "$one" "$(draw 1)"
differ "two seeds" "$one" "$(draw 2)"

# --raw, and a base model, which can do nothing else
raw=$(say --raw -p "Once upon a time" -n 12)
differ "--raw" "" "$raw"
same "--raw by stdin" "$raw" "$(printf 'Once upon a time' | "$cli" -m "$m" --temp 0 --raw -n 12)"
if [ -d "$stories" ]; then
  "$bin/qnext-convert" "$stories" -o "$tmp/base.qn" --chat none --no-mtp >/dev/null 2>&1 || fault "converting with --chat none"
  same "a base model continues" "$raw" "$("$cli" -m "$tmp/base.qn" --temp 0 -p "Once upon a time" -n 12 </dev/null)"
  refused 1 "base" "$cli" -m "$tmp/base.qn" --chat
  refused 1 "base" "$cli" -m "$tmp/base.qn" --system x -p y

  # thoughts: shown on request and kept apart
  "$bin/qnext-convert" "$stories" -o "$tmp/thinks.qn" --chat thinking >/dev/null 2>&1 || fault "converting with --chat thinking"
  "$cli" -m "$tmp/thinks.qn" --temp 0 -p "What is 75 plus 97?" -v >"$tmp/out" 2>"$tmp/err" </dev/null
  "$cli" -m "$tmp/thinks.qn" --temp 0 -p "What is 75 plus 97?" --json >"$tmp/json" </dev/null
  has "a thought in --json" '"reasoning":"[^"]' "$tmp/json"
  thought=$(sed 's/.*"reasoning":"\([^"\\]*\).*/\1/' "$tmp/json")
  has "a thought with -v" "$thought" "$tmp/err"
  same "the answer after a thought" "$(sed 's/^{"text":"\([^"]*\)".*/\1/' "$tmp/json")" "$(cat "$tmp/out")"
  lacks "stdout after a thought" "think>" "$tmp/out"

  # a file with a tokenizer only
  "$bin/qnext-convert" --tokenizer-only "$stories" -o "$tmp/words.qn" >/dev/null 2>&1 || fault "--tokenizer-only"
  same "--tokenize without weights" "$(echo '{"text":"A b<|im_end|>"}' | "$cli" -m "$m" --tokenize)" "$(echo '{"text":"A b<|im_end|>"}' | "$cli" -m "$tmp/words.qn" --tokenize)"
  refused 1 "words.qn" "$cli" -m "$tmp/words.qn" -p x
fi

# ---- tokens and back
cat >"$tmp/lines.jsonl" <<'END'
{"text":"Hello, world! 2025 <|im_start|>user\n<think> \"quoted\" \\ \t end"}
{"text":""}
{"text":"grüße 你好 😀"}
END
"$cli" -m "$m" --tokenize <"$tmp/lines.jsonl" >"$tmp/ids.jsonl"
same "lines of ids" 3 "$(grep -c '^{"ids":\[[0-9,]*\]}$' "$tmp/ids.jsonl")"
"$cli" -m "$m" --detokenize <"$tmp/ids.jsonl" >"$tmp/back.jsonl"
cmp -s "$tmp/lines.jsonl" "$tmp/back.jsonl" || fault "text to ids to text: $(cat "$tmp/back.jsonl")"

# ---- conversations by pipe
chat() { "$cli" -m "$m" --temp 0 --chat --seed 1 "$@" 2>"$tmp/err"; }
first="Tell me a story about a fox."
second="What was the name of the fox?"
printf '%s\n%s\n' "$first" "$second" | chat >"$tmp/two"
a1=$(sed -n 1p "$tmp/two") a2=$(sed -n 2p "$tmp/two")
same "lines of two answers" 2 "$(wc -l <"$tmp/two" | tr -d ' ')"
same "the second turn prefills only what is new" 1 "$(grep -c '^prompt [0-9]* tokens ([1-9][0-9]* reused)' "$tmp/err")"
same "a first turn and one shot" "$(say -p "$first")" "$a1"
printf '%s\n%s\n/undo\n%s\n' "$first" "$second" "$second" | chat >"$tmp/out"
same "/undo" "$a1
$a2
$a2" "$(cat "$tmp/out")"
printf '%s\n/regen\n%s\n/regen\n' "$first" "$second" | chat >"$tmp/out"
same "/regen" "$a1
$a1
$a2
$a2" "$(cat "$tmp/out")"
printf '%s\n/clear\n%s\n' "$first" "$first" | chat >"$tmp/out"
same "/clear" "$a1
$a1" "$(cat "$tmp/out")"
printf '%s\n/tool x\n/tool y\n/undo\n/set  top-k  5 \n/set seed 9223372036854775807\n/regen\n/set\n' "$first" | chat >"$tmp/out"
has "/undo of the result of a tool" "^undone: y$" "$tmp/err"
has "/set with blanks" "^top-k  *5$" "$tmp/err"
printf '/help\n/nonsense\n/set top-p 9\n/undo\n/regen\n\n%s\n/exit\n%s\n' "$first" "$first" | chat >"$tmp/out"
same "commands say nothing on stdout, /exit ends" "$a1" "$(cat "$tmp/out")"
has "/help" "/system TEXT" "$tmp/err"
has "an unknown command" "/nonsense" "$tmp/err"
has "a bad setting" "qnext-cli: .*top-p" "$tmp/err"
printf '/set temp 1.2\n/set top-k 0\n/set top-p 1\n/set seed 1\n%s\n/regen\n' "$first" | chat -n 24 >"$tmp/out"
differ "/regen draws again" "$(sed -n 1p "$tmp/out")" "$(sed -n 2p "$tmp/out")"
printf '/read %s\n' "$tmp/question.txt" | chat --json >"$tmp/out"
has "/read and --json" '"text":"[^"].*"finish":"end"' "$tmp/out"
printf '%s\n%s\n' "$first" "$second" | chat --ctx 64 >"$tmp/out"
has "a full context" "the context is full" "$tmp/err"
has "a full context" "qnext-cli: .*--ctx" "$tmp/err"

# Ctrl-C stops the answer and keeps the conversation (on the slow device, so that there is time to)
mkfifo "$tmp/keys"
"$cli" -m "$m" --temp 0 --chat --device ref <"$tmp/keys" >"$tmp/stopped" 2>"$tmp/stopped.err" &
pid=$!
exec 3>"$tmp/keys"
echo "$first" >&3
tries=0
while [ ! -s "$tmp/stopped" ] && [ $tries -lt 300 ]; do sleep 0.05; tries=$((tries + 1)); done
kill -INT $pid
tries=0
while ! grep -q stopped "$tmp/stopped.err" && [ $tries -lt 300 ]; do sleep 0.05; tries=$((tries + 1)); done
printf '%s\n/exit\n' "$question" >&3
exec 3>&-
wait $pid
same "exit code after Ctrl-C" 0 $?
has "Ctrl-C" "; stopped" "$tmp/stopped.err"
same "answers after Ctrl-C" 2 "$(wc -l <"$tmp/stopped" | tr -d ' ')"
differ "the stopped answer" "$a1" "$(sed -n 1p "$tmp/stopped")"

# ---- a reader that goes away, a stdout that never was: a quiet end
{ say -p "$first"; echo $? >"$tmp/code"; } | head -c 3 >/dev/null
same "a broken pipe" "0:" "$(cat "$tmp/code"):$(cat "$tmp/err")"
say -p "$question" >&-
same "a closed stdout" "0:" "$?:$(cat "$tmp/err")"

# ---- qnext-perplexity: the verdict is the exit code
if [ -d "$data/tiny" ]; then
  "$bin/qnext-convert" "$data/tiny" -o "$tmp/tiny.qn" --experts bf16 >/dev/null 2>&1 || fault "converting tiny"
  check="$bin/qnext-perplexity -m $tmp/tiny.qn --check $data/tiny/expected-0.safetensors"
  for device in ref cpu; do
    $check --device $device --act f32 >"$tmp/out" 2>&1
    same "--check on $device" 0 $?
    has "--check on $device" "greedy *40 of 40 equal" "$tmp/out"
    has "--check on $device" "MTP logits *max" "$tmp/out"
  done
  $check --act f32 --tol 0 >"$tmp/out" 2>&1
  same "--tol 0" 1 $?
  $check --act f32 --json >"$tmp/out" 2>&1
  has "--check --json" '^{"ok":true,"results":\[{.*}\]}$' "$tmp/out"
fi
head -c 2000 "$data/../cli.sh" >"$tmp/text.txt"
"$bin/qnext-perplexity" -m "$m" -f "$tmp/text.txt" --limit 300 --window 128 --stride 64 --against "$m" >"$tmp/out" 2>&1
same "--against itself" 0 $?
has "--against itself" "over 299 tokens in 4 windows" "$tmp/out"
has "--against itself" "KL divergence *mean 0," "$tmp/out"
has "--against itself" "top-1 equal *100.000 %" "$tmp/out"

echo "$tests checks, $bad failed"
[ $bad -eq 0 ]
