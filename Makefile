# Targets of ctkeep. `make demo` and `make test` install what they miss (Debian, as root) or say
# exactly what to install.

CARGO ?= cargo
PREFIX ?= /usr/local
# Without root the live tests run in a user namespace, where the kernel allows it.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,unshare --user --map-root-user)

.PHONY: all demo test check bench install tools cargo-deny

all:
	$(CARGO) build --release --locked

# Shows in under a minute what ctkeep is for.
demo: tools
	$(CARGO) build --release --locked --bin ctkeep --example demo
	$(AS_ROOT) target/release/examples/demo

# Everything: unit, golden bytes, conversations, plan table, command line, live kernel.
test: tools
	$(CARGO) test --locked --no-run
	$(AS_ROOT) $(CARGO) test --locked

check: cargo-deny
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	$(CARGO) deny --log-level error check bans licenses sources

bench: tools
	$(CARGO) bench --locked

install: all
	install -D -m 0755 target/release/ctkeep $(DESTDIR)$(PREFIX)/sbin/ctkeep

tools:
	@sh tests/lab/tools.sh

cargo-deny:
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-deny
