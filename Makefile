# Verbs only; the files are listed in CMakeLists.txt.
MAKEFLAGS += --no-print-directory
BUILD ?= build
JOBS ?= $(shell nproc)
CMAKE_FLAGS ?=
QNEXT_ARCH ?=
FUZZ_COUNT ?= 10000
SKIPPED = grep -c 'SKIPPED: no GPU'
PROGRAMS = qnext-cli qnext-convert qnext-quantize qnext-perplexity qnext-bench

.PHONY: all deps build demo test test-gpu asan fuzz bench-ops format clean help

all: build
	@for p in $(PROGRAMS); do ln -sf $(BUILD)/$$p $$p; done

help:
	@echo "make           build the programs (links to them appear here)"
	@echo "make demo      convert a small trained model and let it answer"
	@echo "make test      all tests"
	@echo "make test-gpu  only those that need a GPU; tests/gpu.sh also measures"
	@echo "make asan      all tests under AddressSanitizer and UBSan"
	@echo "make fuzz      mutants of every kind of file under the sanitizers (FUZZ_COUNT=$(FUZZ_COUNT) of each)"
	@echo "make bench-ops CPU operations at the shapes of the 80B model, GB/s and share of what this machine reads"
	@echo "make clean     remove what was built"
	@echo "QNEXT_ARCH=90a builds GPU code for one GPU only (default: 80, 90a and PTX), CMAKE_FLAGS=-DQNEXT_CUDA=OFF none"

build: deps
	@mkdir -p $(BUILD)
	@cmake -S . -B $(BUILD) -DQNEXT_ARCH="$(QNEXT_ARCH)" $(CMAKE_FLAGS) >$(BUILD)/configure.log 2>&1 || { cat $(BUILD)/configure.log; exit 1; }
	@cmake --build $(BUILD) -j $(JOBS)

demo: all
	@mkdir -p $(BUILD)/demo
	@echo "--- qnext-convert: Hugging Face folder -> one .qn file"
	@./qnext-convert $(BUILD)/data/stories -o $(BUILD)/demo/stories.qn --experts int8
	@echo "--- qnext-cli -m stories.qn -p \"Tell me a story about Lily and a drum.\" --temp 0"
	@./qnext-cli -m $(BUILD)/demo/stories.qn -p "Tell me a story about Lily and a drum." --temp 0
	@echo "--- to chat with it: ./qnext-cli -m $(BUILD)/demo/stories.qn"

test: all
	@cd $(BUILD) && ctest --output-on-failure
	@echo "$$($(SKIPPED) $(BUILD)/Testing/Temporary/LastTest.log) GPU tests SKIPPED"

test-gpu: all
	@$(BUILD)/qnext-tests --test-case='CUDA*' >$(BUILD)/test-gpu.log; code=$$?; cat $(BUILD)/test-gpu.log; \
	echo "$$($(SKIPPED) $(BUILD)/test-gpu.log) GPU tests SKIPPED"; exit $$code

asan:
	@$(MAKE) --no-print-directory build BUILD=build-asan CMAKE_FLAGS=-DQNEXT_SANITIZE=ON
	@cd build-asan && ctest --output-on-failure

fuzz:
	@$(MAKE) --no-print-directory build BUILD=build-asan CMAKE_FLAGS=-DQNEXT_SANITIZE=ON
	@sh tests/fuzz.sh build-asan $(FUZZ_COUNT)

bench-ops: all
	@$(BUILD)/bench-ops

# Debian packages this needs, installed when missing and possible; otherwise one line says what to type.
PACKAGES = cmake g++ libcli11-dev doctest-dev libstb-dev xz-utils
deps:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'install ok installed' || printf ' %s' $$p; done); \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing$$missing"; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null || { echo "qnext: could not install$$missing" >&2; exit 1; }; \
	  else echo "qnext needs packages: sudo apt-get install$$missing" >&2; exit 1; fi; \
	fi

format:
	@git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs clang-format -i

clean:
	rm -rf build build-asan $(PROGRAMS)
