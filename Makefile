# Verbs only; the files are listed in CMakeLists.txt.
BUILD ?= build
JOBS ?= $(shell nproc)

.PHONY: all deps test clean help

all: deps
	@cmake -S . -B $(BUILD) >$(BUILD).log 2>&1 || { cat $(BUILD).log; rm -f $(BUILD).log; exit 1; }; rm -f $(BUILD).log
	@cmake --build $(BUILD) -j $(JOBS)

test: all
	@cd $(BUILD) && ctest --output-on-failure

# Debian packages this needs, installed when missing and possible; otherwise one line says what to type.
PACKAGES = cmake g++ libcli11-dev doctest-dev libstb-dev xz-utils
deps:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'install ok installed' || printf ' %s' $$p; done); \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null || { echo "qnext: could not install$$missing" >&2; exit 1; }; \
	  else echo "qnext needs packages: sudo apt-get install$$missing" >&2; exit 1; fi; \
	fi

clean:
	rm -rf $(BUILD) demo
