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
	$(CARGO) build --locked --bin ctkeep --example demo
	CTKEEP=$(CURDIR)/target/debug/ctkeep $(AS_ROOT) target/debug/examples/demo

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
	$(CARGO) bench --locked --bench '*'

install: all
	install -D -m 0755 target/release/ctkeep $(DESTDIR)$(PREFIX)/sbin/ctkeep
	install -D -m 0644 etc/ctkeep.toml.example $(DESTDIR)$(PREFIX)/share/doc/ctkeep/ctkeep.toml.example
	install -d $(DESTDIR)$(PREFIX)/share/man/man8 $(DESTDIR)$(PREFIX)/share/man/man5 \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	target/release/ctkeep man >$(DESTDIR)$(PREFIX)/share/man/man8/ctkeep.8
	target/release/ctkeep man ctkeep.toml >$(DESTDIR)$(PREFIX)/share/man/man5/ctkeep.toml.5
	target/release/ctkeep completions bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/ctkeep
	target/release/ctkeep completions zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_ctkeep
	target/release/ctkeep completions fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/ctkeep.fish

tools:
	@sh tests/lab/tools.sh

cargo-deny:
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-deny
