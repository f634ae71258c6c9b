//! x
mod played;
use ctkeep::conntrack::decode;
#[test]
fn p() {
    for n in played::hex::names("entries").into_iter().chain(played::hex::names("events")) {
        let d = played::hex::read(&n).remove(0);
        println!(
            "{n} {:?}",
            ctkeep::netlink::frames(&d)
                .map(|f| {
                    let f = f.unwrap();
                    (f.port, decode::entry(f.payload))
                })
                .collect::<Vec<_>>()
        );
    }
    for n in played::hex::names("sockets") {
        let mut d = Some(played::hex::read(&n));
        let mut s = ctkeep::sockdiag::SockDiag::new(played::script(move |_| {
            d.take()
                .unwrap_or_default()
                .into_iter()
                .map(ctkeep::netlink::script::Reply::Datagram)
                .collect()
        }));
        if n.contains("dump") {
            println!("{n} {:#?}", s.sockets(ctkeep::sockdiag::States::connected()))
        } else {
            println!("{n} {:?}", played::hex::read(&n)[0].get(16..).map(|b| b.to_vec()))
        }
    }
}
