//! Rule sets as people have them, each with the limit.

use crate::lab::Lab;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// The limit alone.
    Plain,
    /// INVALID dropped, ESTABLISHED accepted, the limit, all else dropped.
    Strict,
    /// The order of ufw's own chains.
    Ufw,
    /// nft, as firewalld writes it.
    Firewalld,
    /// The widely copied set against floods: most of it in mangle PREROUTING.
    Javapipe,
}

impl Rules {
    pub const ALL: [Self; 5] =
        [Self::Plain, Self::Strict, Self::Ufw, Self::Firewalld, Self::Javapipe];

    pub fn install(self, lab: &Lab, port: u16, limit: usize) {
        if self == Self::Firewalld {
            lab.server.feed("nft -f -", &firewalld(port, limit));
            return;
        }
        for (program, mask) in [("iptables", 32), ("ip6tables", 128)] {
            let over = format!("-m connlimit --connlimit-above {limit} --connlimit-mask {mask}");
            let rules: Vec<String> = match self {
                Self::Plain => vec![format!("-A INPUT -p tcp --syn --dport {port} {over} -j DROP")],
                Self::Strict => vec![
                    "-A INPUT -m conntrack --ctstate INVALID -j DROP".into(),
                    "-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT".into(),
                    format!("-A INPUT -p tcp --syn --dport {port} {over} -j DROP"),
                    format!(
                        "-A INPUT -p tcp --syn --dport {port} -m conntrack --ctstate NEW -j ACCEPT"
                    ),
                    "-P INPUT DROP".into(),
                ],
                Self::Ufw => vec![
                    "-A INPUT -i lo -j ACCEPT".into(),
                    "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".into(),
                    "-A INPUT -m conntrack --ctstate INVALID -j DROP".into(),
                    format!("-A INPUT -p tcp --syn --dport {port} {over} -j REJECT"),
                    format!("-A INPUT -p tcp --dport {port} -j ACCEPT"),
                    "-P INPUT DROP".into(),
                ],
                Self::Javapipe => {
                    let mangle = "-t mangle -A PREROUTING";
                    vec![
                        format!("{mangle} -m conntrack --ctstate INVALID -j DROP"),
                        format!("{mangle} -p tcp ! --syn -m conntrack --ctstate NEW -j DROP"),
                        format!("{mangle} -p tcp -m conntrack --ctstate NEW -m tcpmss ! --mss 536:65535 -j DROP"),
                        format!("{mangle} -p tcp --tcp-flags FIN,SYN FIN,SYN -j DROP"),
                        format!("{mangle} -p tcp --tcp-flags SYN,RST SYN,RST -j DROP"),
                        format!("{mangle} -p tcp --tcp-flags FIN,RST FIN,RST -j DROP"),
                        format!("{mangle} -p tcp --tcp-flags FIN,ACK FIN -j DROP"),
                        format!("{mangle} -p tcp --tcp-flags ACK,URG URG -j DROP"),
                        format!("{mangle} -p tcp --tcp-flags ALL NONE -j DROP"),
                        format!("-A INPUT -p tcp {over} -j REJECT --reject-with tcp-reset"),
                        "-A INPUT -p tcp --tcp-flags RST RST -m limit --limit 2/s --limit-burst 2 -j ACCEPT".into(),
                        "-A INPUT -p tcp --tcp-flags RST RST -j DROP".into(),
                    ]
                }
                Self::Firewalld => unreachable!("above"),
            };
            for rule in rules {
                lab.server.run(&format!("{program} {rule}"));
            }
        }
    }
}

fn firewalld(port: u16, limit: usize) -> String {
    format!(
        "table inet firewalld {{
            set v4 {{ type ipv4_addr; size 65535; flags dynamic; }}
            set v6 {{ type ipv6_addr; size 65535; flags dynamic; }}
            chain filter_INPUT {{
                type filter hook input priority filter + 10; policy accept;
                ct state {{ established, related }} accept
                ct status dnat accept
                iifname lo accept
                ct state invalid drop
                tcp dport {port} ct state new add @v4 {{ ip saddr ct count over {limit} }} reject
                tcp dport {port} ct state new add @v6 {{ ip6 saddr ct count over {limit} }} reject
                tcp dport {port} ct state {{ new, untracked }} accept
                reject with icmpx admin-prohibited
            }}
        }}"
    )
}
