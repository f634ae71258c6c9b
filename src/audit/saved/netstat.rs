//! One line of `netstat -tan`, with any of `-e -o -p -W`, in the languages that net-tools has. Pure.

use super::address::endpoint;
use super::ss::{Row, behind, queue, state};
use super::users::Extras;
use super::{CUT_SHORT, Mistake, Read};
use crate::audit::processes::Holder;
use crate::flow::Endpoint;
use crate::sockdiag::State;

/// Protocols in the first column.
const TCP: [&str; 2] = ["tcp", "tcp6"];
/// Without `-W` an address and its port take this many letters at most; a longer one is cut to just
/// this many, without a sign (seen with net-tools 2.10).
const COLUMN: usize = 23;

/// States as translations of net-tools 2.10 print them (de, cs, pt_BR), and words of older ones.
const TRANSLATED: [(&str, State); 17] = [
    ("VERBUNDEN", State::Established),
    ("SPOJENO", State::Established),
    ("ESTABELECIDA", State::Established),
    ("ESTABLECIDO", State::Established),
    ("VERBINDUNG", State::Established),
    ("SYN_ENVIADO", State::SynSent),
    ("SYN_RECEBIDO", State::SynRecv),
    ("ESPERA_FIN1", State::FinWait1),
    ("ESPERA_FIN2", State::FinWait2),
    ("ESPERANDO_FECHAR", State::CloseWait),
    ("\u{da}LTIMO_ACK", State::LastAck),
    ("POSLEDN\u{cd}", State::LastAck),
    ("FECHAR", State::Close),
    ("ZAV\u{158}EN", State::Close),
    ("FECHANDO", State::Closing),
    ("ZAV\u{cd}R\u{c1}", State::Closing),
    ("NASLOUCH\u{c1}", State::Listen),
];

/// Whether a line is one of netstat's: the protocol, two numbers, two addresses, and a state. `ss`
/// has its state before the numbers.
pub(super) fn is_row(words: &[&str]) -> bool {
    let [protocol, recv, send, local, remote, state, ..] = words else { return false };
    let is_number = |word: &str| word.parse::<u32>().is_ok();
    TCP.contains(protocol)
        && is_number(recv)
        && is_number(send)
        && local.contains(':')
        && remote.contains(':')
        && !super::users::is_continued_by(state)
}

/// Whether addresses of this line are longer than netstat prints them without `-W`.
pub(super) fn is_wide(words: &[&str]) -> bool {
    is_row(words) && words.get(3..5).is_some_and(|ends| ends.iter().any(|end| end.len() > COLUMN))
}

/// `tcp 1 0 192.0.2.1:8080 198.51.100.7:41002 CLOSE_WAIT 33 4711 902/httpd: worker`
pub(super) fn row(text: &str, is_wide: bool) -> Read<Row> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [_, recv, send, local, remote, name, ..] = words.as_slice() else {
        return Err(Mistake::no_socket(text));
    };
    let end = |word: &str| -> Read<Endpoint> {
        if !is_wide && word.len() == COLUMN && word.matches(':').count() > 1 {
            return Err(Mistake::new(
                CUT_SHORT,
                format!("'{word}' may be cut: netstat needs -W for IPv6"),
            ));
        }
        endpoint(word)
    };
    let (local, remote) = (end(local)?, end(remote)?);
    let state = state(name).or_else(|| translated(name)).or_else(|| {
        // A listener in any language.
        (remote.port() == 0 && remote.addr().is_unspecified()).then_some(State::Listen)
    });
    let state = state.ok_or_else(|| Mistake::state(name))?;
    // The Czech word for LAST_ACK is two.
    let columns = if *name == "POSLEDN\u{cd}" { 7 } else { 6 };
    Ok(Row {
        state: Some(state),
        recv_queue: queue(recv)?,
        send_queue: queue(send)?,
        local,
        remote,
        extras: extras(behind(text, columns)),
    })
}

fn translated(name: &str) -> Option<State> {
    TRANSLATED.iter().find(|(word, _)| *word == name).map(|(_, state)| *state)
}

/// `33 4711 902/httpd: worker p  keepalive (7.2/0/0)`: each only where it was asked for.
fn extras(rest: &str) -> Extras {
    let words: Vec<&str> = rest.split_whitespace().collect();
    let mut extras = Extras::default();
    let mut rest = rest;
    if let [uid, inode, ..] = words.as_slice()
        && let (Ok(uid), Ok(inode)) = (uid.parse(), inode.parse())
    {
        (extras.uid, extras.inode) = (Some(uid), Some(inode));
        rest = behind(rest, 2);
    }
    if let Some((pid, name)) = rest.split_once('/')
        && let Ok(pid) = pid.parse()
    {
        extras.holder =
            Some(Holder { pid, command: untimed(name).to_owned(), processes: 1, container: None });
    }
    extras
}

/// A name without the timer behind it (`-o`).
fn untimed(name: &str) -> &str {
    const TIMERS: [&str; 6] = ["off", "on", "keepalive", "timewait", "probe", "unkn-"];
    let Some((before, timer)) = name.trim_end().rsplit_once(" (") else { return name.trim_end() };
    let is_timer = timer.ends_with(')') && timer.matches('/').count() == 2;
    match before.trim_end().rsplit_once(' ') {
        Some((before, word)) if is_timer && TIMERS.iter().any(|it| word.starts_with(it)) => {
            before.trim_end()
        }
        _ => name.trim_end(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_that_can_be_asked_for_is_read() {
        let ends = "192.0.2.1:8080          198.51.100.7:41002      CLOSE_WAIT ";
        for (rest, uid, inode, named) in [
            ("", None, None, None),
            ("-", None, None, None),
            ("902/httpd: worker p ", None, None, Some("httpd: worker p")),
            ("33         4711       902/httpd           ", Some(33), Some(4711), Some("httpd")),
            ("0          0          -                    off (0.00/0/0)", Some(0), Some(0), None),
            ("902/a (1/2/3) b      keepalive (7.20/0/0)", None, None, Some("a (1/2/3) b")),
        ] {
            let text = format!("tcp        1      0 {ends}{rest}");
            assert!(is_row(&text.split_whitespace().collect::<Vec<_>>()));
            let read = row(&text, false).unwrap();
            assert_eq!(read.state, Some(State::CloseWait));
            assert_eq!((read.extras.uid, read.extras.inode), (uid, inode), "{rest}");
            let command = read.extras.holder.map(|holder| holder.command);
            assert_eq!(command.as_deref(), named, "{rest}");
        }
    }

    #[test]
    fn states_are_read_in_other_languages_and_unknown_ones_are_named() {
        let with =
            |state: &str| row(&format!("tcp 0 0 192.0.2.1:80 198.51.100.7:4000 {state}"), false);
        assert_eq!(with("VERBUNDEN").unwrap().state, Some(State::Established));
        assert_eq!(with("ESPERANDO_FECHAR").unwrap().state, Some(State::CloseWait));
        assert_eq!(with("FIN_WAIT2").unwrap().state, Some(State::FinWait2));
        assert!(with("LUKUSSA").unwrap_err().what.contains("unknown state 'LUKUSSA'"));
        let listener = row("tcp6 0 0 :::80 :::* OU\u{c7}A 900/httpd", false).unwrap();
        assert_eq!(listener.state, Some(State::Listen));
    }

    #[test]
    fn an_address_that_may_be_cut_is_not_believed() {
        let with = |local: &str| format!("tcp6 0 0 {local} 2001:db8:1::7:4000 ESTABLISHED");
        let cut = with("2001:db8:aaaa:bbbb::c:80");
        assert!(row(&cut, false).is_ok(), "one letter longer: there -W was given");
        let cut = with("2001:db8:aaa:bbbb::c:80");
        assert!(row(&cut, false).unwrap_err().what.contains("-W"));
        assert!(row(&cut, true).is_ok());
        assert!(row(&with("::ffff:198.51.100.20:80"), false).is_err());
        assert!(row(&with("2001:db8::1:2:3:4:8080"), false).is_ok());
    }
}
