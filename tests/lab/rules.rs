//! Rule sets as texts for `iptables-restore` and `nft -f -`.

/// The limit of most rule sets, as iptables has it.
pub const CONNLIMIT: &str = "-m connlimit --connlimit-above 3 --connlimit-mask 32";

/// The same for `ip6tables-restore`.
pub const CONNLIMIT6: &str = "-m connlimit --connlimit-above 3 --connlimit-mask 128";

/// The usual place of an nft chain.
pub const INPUT: &str = "input priority 0";

/// A table of iptables with these chains (`NAME` or `NAME=POLICY`) and rules.
pub fn restore(table: &str, chains: &str, rules: &[&str]) -> String {
    let mut text = format!("*{table}\n");
    for chain in chains.split(' ') {
        let (name, policy) = chain.split_once('=').unwrap_or((chain, "ACCEPT"));
        text += &format!(":{name} {policy} [0:0]\n");
    }
    for rule in rules {
        text += &format!("-A {rule}\n");
    }
    text + "COMMIT\n"
}

/// Rules of the INPUT chain.
pub fn input(rules: &[&str]) -> String {
    restore("filter", "INPUT", rules)
}

/// A chain of the `inet` family with these rules.
pub fn chain(hook: &str, rules: &str) -> String {
    format!(
        "table inet limits {{\n\
           set web {{ type ipv4_addr; flags dynamic; }}\n\
           set web6 {{ type ipv6_addr; flags dynamic; }}\n\
           chain web_input {{\n type filter hook {hook}; policy accept;\n {rules}\n }}\n\
         }}\n"
    )
}

/// A SYN proxy in front of port 80, and more rules behind it.
pub fn syn_proxy(rules: &[&str]) -> String {
    let untracked = "PREROUTING -i eth0 -p tcp --dport 80 --syn -j CT --notrack";
    let proxy = "-j SYNPROXY --sack-perm --timestamp --wscale 7 --mss 1460";
    let before = [
        &format!("INPUT -p tcp --dport 80 -m conntrack --ctstate INVALID,UNTRACKED {proxy}"),
        "INPUT -m conntrack --ctstate INVALID -j DROP",
    ];
    restore("raw", "PREROUTING", &[untracked]) + &input(&[&before, rules].concat())
}
