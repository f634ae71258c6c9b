# Targets of ctkeep. `make demo` and `make test` install what they miss (Debian, as root) or say
# exactly what to install.

CARGO ?= cargo
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
DOCDIR = $(PREFIX)/share/doc/ctkeep
DATADIR = $(PREFIX)/share/ctkeep
TARGET := $(or $(CARGO_TARGET_DIR),target)
PROFILE ?= release
BUILD = $(TARGET)/$(PROFILE:dev=debug)
STATIC = x86_64-unknown-linux-musl
# What to build beside the program: dependencies are compiled with the features that all of it needs.
WITH ?=
# Without root the live tests run in a user namespace, where the kernel allows it.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,unshare --user --map-root-user)

# Live tests wait more than they work: four at a time, on two cores, take 13 minutes.
TEST_THREADS ?= 4
FUZZ_SECONDS ?= 60
FUZZ_TARGETS = conntrack sockdiag netlink nflog ruleset saved options http
# Debian's: bullseye, bookworm, trixie, and the newest of all. Any other that its suites list goes, too:
# make test-kernels KERNELS="6.12.73 6.18.5"
KERNELS ?= 5.10 6.1 6.12 sid

.PHONY: all demo test play-test test-kernels top-test docker-test containers-test reload-test history-test apache-test ban-test pictures attack-search laws faults check advisories fuzz soak bench install stage deb rpm static package-test \
	kubernetes-check dashboard-check tools shield-tools test-tools kernel-tools cargo-deny cargo-deb \
	cargo-generate-rpm cargo-fuzz

all:
	$(CARGO) build --locked --profile $(PROFILE) $(WITH)

# Shows what ctkeep is for: 7 seconds, and a minute or a little more to build it the first time, on two processors.
demo: tools
	$(CARGO) build --locked --profile demo --features demo --bin ctkeep --bin ctkeep-demo
	$(AS_ROOT) $(TARGET)/demo/ctkeep-demo

# Everything: unit, golden bytes, conversations, plan table, command line, live kernel.
test: test-tools
	$(CARGO) test --locked --no-run
	$(AS_ROOT) env RUST_TEST_THREADS=$(TEST_THREADS) CARGO="$(CARGO)" tests/run.sh

# Thousands of random rule sets, played and tried on the running kernel; CTKEEP_RULE_SETS says how many.
play-test:
	$(CARGO) test --locked --no-run --test live
	$(AS_ROOT) $(CARGO) test --locked --test live -- --ignored --nocapture thousands

# The core of the live tests on other kernels, in QEMU.
test-kernels: shield-tools kernel-tools
	CARGO="$(CARGO)" tests/kernels/run.sh $(KERNELS)

# `ctkeep top` on a table of 2 000 000 entries, which a guest's kernel is given: an hour.
top-test: kernel-tools
	$(CARGO) bench --locked --bench top --no-run --message-format=json >target/top.json
	tests/kernels/top.sh sid "$$(sed -n 's/.*"kind":\["bench"\].*"executable":"\([^"]*\)".*/\1/p' target/top.json)"

# Containers of the real Docker, Debian's, which is not installed: its own programs, data folder and network.
docker-test:
	mkdir -p target/docker
	cd target/docker && apt-get download docker.io containerd runc && \
		for package in *.deb; do dpkg -x $$package root && rm $$package; done
	ln -sf ../sbin/dockerd ../sbin/docker-proxy ../sbin/runc target/docker/root/usr/bin/
	$(CARGO) test --locked --no-run --test live
	$(AS_ROOT) env CTKEEP_DOCKER=$(CURDIR)/target/docker/root/usr/bin $(CARGO) test --locked --test live docker::

# Reloads twenty times each, those of ufw and firewalld themselves too: Debian's, which are not installed.
reload-test: test-tools
	mkdir -p target/frontends
	cd target/frontends && apt-get download ufw firewalld python3-firewall python3-nftables python3-gi python3-dbus \
		gir1.2-glib-2.0 libgirepository-1.0-1 && dpkg -x ufw_*.deb ufw && rm ufw_*.deb && \
		for package in *.deb; do dpkg -x $$package firewalld && rm $$package; done
	$(CARGO) test --locked --no-run --test live
	$(AS_ROOT) env CTKEEP_UFW=$(CURDIR)/target/frontends/ufw CTKEEP_FIREWALLD=$(CURDIR)/target/frontends/firewalld \
		CTKEEP_RELOADS=20 CTKEEP_STORM=30 $(CARGO) test --locked --test live reload:: -- --include-ignored --nocapture
	$(AS_ROOT) $(CARGO) test --locked --test live large -- --ignored --nocapture

# The daemon killed at a hundred moments of its work: what it has kept is there.
history-test: test-tools
	$(CARGO) test --locked --no-run --test live
	$(AS_ROOT) $(CARGO) test --locked --test live at_a_hundred -- --ignored --nocapture

# Slowloris against the real Apache, Debian's, which is not installed.
apache-test: test-tools
	mkdir -p target/apache
	cd target/apache && apt-get download apache2-bin libapr1 libaprutil1 liblua5.3-0 libjansson4 && \
		for package in *.deb; do dpkg -x $$package root && rm $$package; done
	$(CARGO) test --locked --no-run --test live
	$(AS_ROOT) env CTKEEP_APACHE=$(CURDIR)/target/apache/root $(CARGO) test --locked --test live apache:: -- --ignored --nocapture

# What bans by the log line of an overload: the real fail2ban and CrowdSec, Debian's, which are not installed.
ban-test: test-tools
	mkdir -p target/bans
	cd target/bans && apt-get download fail2ban crowdsec && \
		for package in *.deb; do dpkg -x $$package root && rm $$package; done
	$(CARGO) test --locked --no-run --test live
	$(AS_ROOT) env CTKEEP_BANS=$(CURDIR)/target/bans/root $(CARGO) test --locked --test live real_fail2ban -- --ignored

# The pictures of docs/images that a browser takes of the status page, by the test of that page.
pictures: test-tools
	$(CARGO) test --locked --no-run --test live
	mkdir -p target/pictures
	$(AS_ROOT) env CTKEEP_PICTURES=$(CURDIR)/target/pictures $(CARGO) test --locked --test live browser::
	cp target/pictures/light.png docs/images/status.png
	cp target/pictures/dark.png docs/images/status-dark.png
	cp target/pictures/telephone.png docs/images/status-telephone.png

# The same of podman, of root and of a user; then what takes a minute: containers that come and go, 5 000 processes.
containers-test: docker-test
	mkdir -p target/podman
	cd target/podman && apt-get download podman conmon netavark aardvark-dns runc libgpgme11 libsubid4 libassuan0 \
		libdevmapper1.02.1 slirp4netns libslirp0 passt && for package in *.deb; do dpkg -x $$package root && rm $$package; done
	$(CARGO) test --locked --no-run --test live
	$(AS_ROOT) env CTKEEP_PODMAN=$(CURDIR)/target/podman/root $(CARGO) test --locked --test live podman::
	$(AS_ROOT) $(CARGO) test --locked --test live -- --ignored --nocapture --test-threads 1 \
		found:: counted_once_whether

check: cargo-deny
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets --features demo -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	$(CARGO) deny --log-level error check bans licenses sources

# Known weaknesses of the locked dependencies; needs the network.
advisories: cargo-deny
	$(CARGO) deny --log-level error check advisories

# Hours of mixed load: make soak SOAK=8h
soak: tools
	CTKEEP_SOAK=$(or $(SOAK),30m) $(AS_ROOT) $(CARGO) test --locked --test live a_long_load -- --ignored --nocapture

# A hundred thousand random histories of tables that are fooled, faulty and full (docs/testing.md).
laws:
	PROPTEST_CASES=$(or $(CASES),20000) $(CARGO) test --locked --release --test laws

# Every call of a repair with every error, and two hundred kills (docs/testing.md).
faults: test-tools
	$(CARGO) test --locked --no-run --test live
	$(AS_ROOT) env CTKEEP_FAULTS=all CTKEEP_KILLS=200 $(CARGO) test --locked --test live faults:: -- --nocapture

# Random packets against a host without ctkeep and one with it (docs/attack.md): make attack-search SEARCH=2h
attack-search: test-tools
	$(CARGO) test --locked --no-run --test live
	CTKEEP_SEARCH=$(or $(SEARCH),30m) CTKEEP_SEARCH_SEED=$(or $(SEED),1) $(AS_ROOT) $(CARGO) test --locked \
		--test live a_long_search -- --ignored --nocapture

bench: shield-tools
	$(CARGO) bench --locked --bench '*'

# Each target for FUZZ_SECONDS, from the committed seeds on. Needs a nightly compiler.
fuzz: cargo-fuzz
	cd fuzz && for target in $(FUZZ_TARGETS); do \
		mkdir -p corpus/$$target && \
		$(CARGO) +nightly fuzz run --fuzz-dir . $$target corpus/$$target seeds/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 || exit; \
	done

# Root installs what another user has built: sudo finds no cargo in that user's home.
install: $(BUILD)/ctkeep
	install -D -m 0755 $(BUILD)/ctkeep $(DESTDIR)$(PREFIX)/sbin/ctkeep
	install -D -m 0644 packaging/modules-load.conf $(DESTDIR)$(PREFIX)/lib/modules-load.d/ctkeep.conf
	install -d $(DESTDIR)$(SYSCONFDIR)/ctkeep $(DESTDIR)$(DOCDIR)/examples $(DESTDIR)$(DOCDIR)/images \
		$(DESTDIR)$(PREFIX)/lib/systemd/system \
		$(DESTDIR)$(PREFIX)/share/man/man8 $(DESTDIR)$(PREFIX)/share/man/man5 \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions \
		$(DESTDIR)$(PREFIX)/share/zsh/vendor-completions \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	sed 's,/usr/sbin/,$(PREFIX)/sbin/,; s,/etc/ctkeep/,$(SYSCONFDIR)/ctkeep/,' packaging/ctkeep.service \
		>$(DESTDIR)$(PREFIX)/lib/systemd/system/ctkeep.service
	test -e $(DESTDIR)$(SYSCONFDIR)/ctkeep/ctkeep.toml || \
		install -m 0644 etc/ctkeep.toml.example $(DESTDIR)$(SYSCONFDIR)/ctkeep/ctkeep.toml
	install -m 0644 README.md docs/*.md docs/*.json $(DESTDIR)$(DOCDIR)
	install -m 0644 docs/images/* $(DESTDIR)$(DOCDIR)/images
	install -m 0644 etc/ctkeep.toml.example $(DESTDIR)$(DOCDIR)/examples
	# Each names the place that it is copied from.
	for file in packaging/ctkeep.service.d/*.conf packaging/sysctl.conf; do \
		sed 's,/usr/share/doc/ctkeep,$(DOCDIR),' $$file >$(DESTDIR)$(DOCDIR)/examples/$$(basename $$file) || exit; \
	done
	install -D -m 0644 packaging/prometheus/ctkeep.rules.yml $(DESTDIR)$(DATADIR)/prometheus/ctkeep.rules.yml
	for file in fail2ban/ctkeep-overload.conf crowdsec/ctkeep-overload-parser.yaml crowdsec/ctkeep-overload-scenario.yaml; do \
		install -D -m 0644 packaging/$$file $(DESTDIR)$(DATADIR)/$$file || exit 1; \
	done
	install -D -m 0644 packaging/grafana/ctkeep.json $(DESTDIR)$(DATADIR)/grafana/ctkeep.json
	$(BUILD)/ctkeep man >$(DESTDIR)$(PREFIX)/share/man/man8/ctkeep.8
	$(BUILD)/ctkeep man ctkeep.toml >$(DESTDIR)$(PREFIX)/share/man/man5/ctkeep.toml.5
	$(BUILD)/ctkeep completions bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/ctkeep
	$(BUILD)/ctkeep completions zsh >$(DESTDIR)$(PREFIX)/share/zsh/vendor-completions/_ctkeep
	$(BUILD)/ctkeep completions fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/ctkeep.fish

$(BUILD)/ctkeep:
	$(MAKE) all

# The whole tree of an installation, that both kinds of packages are made of.
stage: all
	rm -rf target/stage
	$(MAKE) install PREFIX=/usr SYSCONFDIR=/etc DESTDIR=target/stage
	strip target/stage/usr/sbin/ctkeep
	packaging/changelog.sh >target/stage/changelog

# VERSION, if given, is that of the package: make deb VERSION=0.2.0-2
deb: stage cargo-deb
	$(CARGO) deb --no-build --no-strip --locked $(if $(filter dev,$(PROFILE)),--fast) $(if $(VERSION),--deb-version $(VERSION)) --output target/debian/

rpm: stage cargo-generate-rpm
	mkdir -p target/rpm
	$(CARGO) generate-rpm --output target/rpm/

# One file that runs on every x86-64 Linux, whatever its C library.
static:
	rustup target add $(STATIC)
	$(CARGO) build --release --locked --target $(STATIC)
	@echo $(TARGET)/$(STATIC)/release/ctkeep

.PHONY: dist msrv

# What a release consists of, in target/dist. Targets that cannot be built here are left out, and named.
STATICS ?= x86_64-unknown-linux-musl aarch64-unknown-linux-musl
dist: deb rpm
	CARGO="$(CARGO)" packaging/dist.sh $(PROFILE) $(STATICS)

# The oldest compiler that is promised (rust-version in Cargo.toml).
msrv:
	version=$$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) && \
		rustup toolchain install $$version --profile minimal && \
		$(CARGO) +$$version check --locked --target-dir $(TARGET)/msrv

# The package, in a Debian of its own under its own systemd: install, attack, upgrade, purge.
package-test: test-tools
	packaging/test.sh

kubernetes-check:
	packaging/kubernetes/check.sh

dashboard-check:
	packaging/grafana/check.sh

tools:
	@sh tests/lab/tools.sh

# What the build needs for the shield; without it the shield is left out.
shield-tools:
	@sh tests/lab/tools.sh shield

test-tools:
	@sh tests/lab/tools.sh tests

kernel-tools:
	@sh tests/lab/tools.sh kernels

# It runs for a second: unoptimised it is built in a third of the time.
cargo-deny: export CARGO_PROFILE_RELEASE_OPT_LEVEL = 0
cargo-deny: export CARGO_PROFILE_RELEASE_LTO = off
cargo-deny cargo-deb cargo-generate-rpm cargo-fuzz:
	@$(CARGO) $(@:cargo-%=%) --version >/dev/null 2>&1 || $(CARGO) install --locked $@
