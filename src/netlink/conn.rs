//! Requests and their answers over one [`Transport`].

use std::fmt;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP,
    NLMSG_OVERRUN, NetlinkBuffer,
};

use super::frame::{Frame, NLMSG_HDRLEN, frames};
use super::transport::{Transport, receive_failure};
use crate::error::{Cause, Op, Result};

/// Messages in one send. Each gets at most two answers, so the receive buffer always has room.
const BATCH: usize = 64;

/// Bytes that may come in answer to one send. A table of ten million entries fills less.
const ANSWER: u64 = 4 << 30;

/// How often an interrupted dump is begun anew.
const DUMP_ATTEMPTS: u32 = 5;

/// One message to the kernel.
#[derive(Clone, Debug)]
pub struct Request {
    /// What it asks, for error messages.
    pub op: Op,
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags` beyond `NLM_F_REQUEST` and what the way of sending adds.
    pub flags: u16,
    /// Everything after the netlink header.
    pub body: Vec<u8>,
    /// Travels in the same send as the request behind it: the two run back to back.
    pub joined: bool,
}

impl Request {
    fn write(&self, out: &mut Vec<u8>, flags: u16, seq: u32) -> Result<()> {
        let start = out.len();
        let length = NLMSG_HDRLEN + self.body.len();
        out.resize(start + NLMSG_HDRLEN, 0);
        out.extend_from_slice(&self.body);
        out.resize(start + length.next_multiple_of(4), 0);
        let message = out.get_mut(start..).unwrap_or_default();
        let mut header = NetlinkBuffer::new(message);
        header.set_length(u32::try_from(length).map_err(|e| self.op.malformed(e))?);
        header.set_message_type(self.kind);
        header.set_flags(NLM_F_REQUEST | self.flags | flags);
        header.set_sequence_number(seq);
        Ok(())
    }
}

/// What ends the answer to a request that is not refused.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The acknowledgement, behind any number of messages.
    Acknowledgement,
    /// The one message that answers it.
    Answer,
}

impl End {
    fn flags(self) -> u16 {
        match self {
            Self::Acknowledgement => NLM_F_ACK,
            Self::Answer => 0,
        }
    }
}

/// Called at each datagram of an answer.
struct OnAnswer(Box<dyn Fn() + Send>);

impl fmt::Debug for OnAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnAnswer")
    }
}

/// A conversation with one kernel subsystem.
#[derive(Debug)]
pub struct Conversation<T> {
    transport: T,
    seq: u32,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    interrupted_dumps: u64,
    on_answer: Option<OnAnswer>,
}

impl<T: Transport> Conversation<T> {
    /// A conversation over `transport`.
    pub fn new(transport: T) -> Self {
        Self {
            transport,
            seq: 0,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            interrupted_dumps: 0,
            on_answer: None,
        }
    }

    /// Has `alive` called at each datagram of an answer: a dump of millions takes its time.
    pub fn on_answer(&mut self, alive: impl Fn() + Send + 'static) {
        self.on_answer = Some(OnAnswer(Box::new(alive)));
    }

    /// The transport below.
    pub fn transport(&self) -> &T {
        &self.transport
    }

    /// The transport, when the conversation is over.
    pub fn into_transport(self) -> T {
        self.transport
    }

    /// Gives back the room for an answer: of many conversations most are silent most of the time.
    pub fn rest(&mut self) {
        self.outgoing = Vec::new();
        self.incoming = Vec::new();
    }

    /// Dumps that the kernel marked as inconsistent and that were begun anew.
    pub fn interrupted_dumps(&self) -> u64 {
        self.interrupted_dumps
    }

    /// Sends one request and waits for its acknowledgement.
    ///
    /// # Errors
    /// The kernel's refusal, or a broken conversation.
    pub fn execute(&mut self, request: &Request) -> Result<()> {
        self.query(request, |_| Ok(()))
    }

    /// Sends one request; `answer` sees each message that comes before the acknowledgement.
    ///
    /// # Errors
    /// The kernel's refusal, the error of `answer`, or a broken conversation.
    pub fn query(
        &mut self,
        request: &Request,
        answer: impl FnMut(Frame<'_>) -> Result<()>,
    ) -> Result<()> {
        self.exchange_one(request, End::Acknowledgement, answer)
    }

    /// Sends many requests, many in one send, and returns one result for each, in order.
    ///
    /// The kernel runs them in order; one that fails does not stop the rest. `answer` sees each
    /// message that answers request `i`.
    ///
    /// # Errors
    /// The outer error is a broken conversation: how far the kernel came is then unknown, and
    /// what counts is to look again.
    pub fn batch(
        &mut self,
        requests: &[Request],
        answer: impl FnMut(usize, Frame<'_>) -> Result<()>,
    ) -> Result<Vec<Result<()>>> {
        self.exchange(requests, End::Acknowledgement, answer)
    }

    /// As [`Conversation::batch`], for look-ups: each is answered by one message or by a refusal, and
    /// asks for no acknowledgement behind it. That is half of what there is to receive.
    ///
    /// # Errors
    /// As [`Conversation::batch`].
    pub fn look_up(
        &mut self,
        requests: &[Request],
        answer: impl FnMut(usize, Frame<'_>) -> Result<()>,
    ) -> Result<Vec<Result<()>>> {
        self.exchange(requests, End::Answer, answer)
    }

    /// As [`Conversation::look_up`], for one.
    ///
    /// # Errors
    /// As [`Conversation::query`].
    pub fn ask(
        &mut self,
        request: &Request,
        answer: impl FnMut(Frame<'_>) -> Result<()>,
    ) -> Result<()> {
        self.exchange_one(request, End::Answer, answer)
    }

    /// As [`Conversation::look_up`], with what `read` makes of each answer; `None` where what was asked
    /// for, `what`, is absent, or something else came in its place.
    ///
    /// # Errors
    /// As [`Conversation::batch`], and any other refusal. An unanswered question is never `None`.
    pub fn find<V>(
        &mut self,
        requests: &[Request],
        what: &str,
        mut read: impl FnMut(usize, Op, Frame<'_>) -> Result<Option<V>>,
    ) -> Result<Vec<Option<V>>> {
        // The outer `None`: not answered yet.
        let mut answers: Vec<Option<Option<V>>> = requests.iter().map(|_| None).collect();
        let outcomes = self.look_up(requests, |index, frame| {
            if let (Some(request), Some(answer)) = (requests.get(index), answers.get_mut(index)) {
                *answer = Some(read(index, request.op, frame)?);
            }
            Ok(())
        })?;
        outcomes
            .into_iter()
            .zip(answers)
            .zip(requests)
            .map(|((outcome, answer), request)| match (outcome, answer) {
                (Ok(()), Some(value)) => Ok(value),
                (Ok(()), None) => {
                    Err(request.op.malformed(format_args!("acknowledged without {what}")))
                }
                (Err(error), _) if error.is_absent() => Ok(None),
                (Err(error), _) => Err(error),
            })
            .collect()
    }

    fn exchange_one(
        &mut self,
        request: &Request,
        end: End,
        mut answer: impl FnMut(Frame<'_>) -> Result<()>,
    ) -> Result<()> {
        let one = std::slice::from_ref(request);
        let outcomes = self.exchange(one, end, |_, frame| answer(frame))?;
        outcomes.into_iter().next().unwrap_or(Ok(()))
    }

    fn exchange(
        &mut self,
        requests: &[Request],
        end: End,
        mut answer: impl FnMut(usize, Frame<'_>) -> Result<()>,
    ) -> Result<Vec<Result<()>>> {
        let mut outcomes = Vec::with_capacity(requests.len());
        let mut rest = requests;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(batch_length(rest));
            self.send_batch(now, end, &mut outcomes, &mut answer)?;
            rest = later;
        }
        Ok(outcomes)
    }

    fn send_batch(
        &mut self,
        requests: &[Request],
        end: End,
        outcomes: &mut Vec<Result<()>>,
        answer: &mut impl FnMut(usize, Frame<'_>) -> Result<()>,
    ) -> Result<()> {
        let base = outcomes.len();
        let Some(op) = requests.first().map(|request| request.op) else { return Ok(()) };
        let first = self.seq.wrapping_add(1);
        self.outgoing.clear();
        for request in requests {
            self.seq = self.seq.wrapping_add(1);
            request.write(&mut self.outgoing, end.flags(), self.seq)?;
        }
        self.transport.send(&self.outgoing).map_err(|error| op.io(error))?;

        let mut refused: Option<crate::error::Error> = None;
        let (mut done, mut room) = (0, ANSWER);
        while done < requests.len() {
            self.receive(op, &mut room)?;
            for frame in frames(&self.incoming) {
                let frame = frame.map_err(|error| op.malformed(error))?;
                let Some(index) = answer_index(frame.seq, first, requests.len(), op)? else {
                    continue;
                };
                // Answers come in order: one for a later request means that one was lost.
                if index != done {
                    return Err(op.failed(Cause::Overrun));
                }
                let op = requests.get(index).map_or(op, |request| request.op);
                match frame.kind {
                    NLMSG_NOOP => {}
                    NLMSG_OVERRUN => return Err(op.failed(Cause::Overrun)),
                    NLMSG_DONE => return Err(op.malformed("end of a dump that was not asked for")),
                    NLMSG_ERROR => {
                        let cause = frame.acknowledgement().map_err(|e| op.malformed(e))?;
                        outcomes.push(match (cause, refused.take()) {
                            (Some(cause), _) => Err(op.failed(cause)),
                            (None, Some(error)) => Err(error),
                            (None, None) => Ok(()),
                        });
                        done += 1;
                    }
                    _ => match (answer(base + index, frame), end) {
                        (answered, End::Answer) => {
                            outcomes.push(answered);
                            done += 1;
                        }
                        (Err(error), End::Acknowledgement) => {
                            refused.get_or_insert(error);
                        }
                        (Ok(()), End::Acknowledgement) => {}
                    },
                }
            }
        }
        Ok(())
    }

    /// Receives the next datagram of an answer, of which `room` bytes may still come.
    fn receive(&mut self, op: Op, room: &mut u64) -> Result<()> {
        self.transport
            .recv(&mut self.incoming)
            .map_err(|error| op.failed(receive_failure(error)))?;
        if let Some(OnAnswer(alive)) = &self.on_answer {
            alive();
        }
        // One without content counts, too.
        let length = self.incoming.len().max(NLMSG_HDRLEN) as u64;
        *room = room.checked_sub(length).ok_or_else(|| op.malformed("it has no end"))?;
        Ok(())
    }

    /// Sends `messages` between `begin` and `end`: the kernel carries out all of them or none
    /// (`nfnetlink_rcv_batch()`).
    ///
    /// # Errors
    /// The first refusal, or a broken conversation.
    pub fn transaction(
        &mut self,
        begin: &Request,
        messages: &[Request],
        end: &Request,
    ) -> Result<()> {
        let op = begin.op;
        self.outgoing.clear();
        self.seq = self.seq.wrapping_add(1);
        let first = self.seq;
        begin.write(&mut self.outgoing, 0, first)?;
        for message in messages {
            self.seq = self.seq.wrapping_add(1);
            message.write(&mut self.outgoing, NLM_F_ACK, self.seq)?;
        }
        self.seq = self.seq.wrapping_add(1);
        end.write(&mut self.outgoing, 0, self.seq)?;
        self.transport.send(&self.outgoing).map_err(|error| op.io(error))?;

        let (mut done, mut room) = (0, ANSWER);
        while done < messages.len() {
            self.receive(op, &mut room)?;
            for frame in frames(&self.incoming) {
                let frame = frame.map_err(|error| op.malformed(error))?;
                if answer_index(frame.seq, first, messages.len() + 2, op)?.is_none()
                    || frame.kind != NLMSG_ERROR
                {
                    continue;
                }
                // A refusal of any message, or of the whole, undoes all; the answers that may
                // follow it are late ones to the next request.
                if let Some(cause) = frame.acknowledgement().map_err(|e| op.malformed(e))? {
                    return Err(op.failed(cause));
                }
                done += 1;
            }
        }
        Ok(())
    }

    /// Runs a dump and folds its messages into a fresh `A`.
    ///
    /// Streaming: a message is seen once, inside the receive buffer. When the kernel says that
    /// the table changed under the dump (`NLM_F_DUMP_INTR`) it is begun anew with another fresh
    /// `A`, and counted.
    ///
    /// # Errors
    /// The kernel's refusal, the error of `take`, lost or malformed messages: never a short list.
    pub fn dump<A: Default>(
        &mut self,
        request: &Request,
        mut take: impl FnMut(&mut A, Frame<'_>) -> Result<()>,
    ) -> Result<A> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut all = A::default();
            if self.dump_once(request, |frame| take(&mut all, frame))? {
                return Ok(all);
            }
            self.interrupted_dumps += 1;
        }
        Err(request.op.failed(Cause::Interrupted { attempts: DUMP_ATTEMPTS }))
    }

    /// One pass; `false` when the kernel marked it as inconsistent.
    fn dump_once(
        &mut self,
        request: &Request,
        mut take: impl FnMut(Frame<'_>) -> Result<()>,
    ) -> Result<bool> {
        let op = request.op;
        self.seq = self.seq.wrapping_add(1);
        self.outgoing.clear();
        request.write(&mut self.outgoing, NLM_F_DUMP, self.seq)?;
        self.transport.send(&self.outgoing).map_err(|error| op.io(error))?;

        let mut consistent = true;
        let mut refused = None;
        let mut room = ANSWER;
        loop {
            self.receive(op, &mut room)?;
            for frame in frames(&self.incoming) {
                let frame = frame.map_err(|error| op.malformed(error))?;
                if answer_index(frame.seq, self.seq, 1, op)?.is_none() {
                    continue;
                }
                consistent &= frame.flags & NLM_F_DUMP_INTR == 0;
                let cause = match frame.kind {
                    NLMSG_NOOP => continue,
                    NLMSG_OVERRUN => Some(Cause::Overrun),
                    NLMSG_ERROR => frame.acknowledgement().map_err(|e| op.malformed(e))?,
                    NLMSG_DONE => frame.done_status().map_err(|e| op.malformed(e))?,
                    _ => {
                        // Read on after a message that cannot be used, so that the rest of the
                        // dump does not lie in the way of the next request.
                        if refused.is_none() {
                            refused = take(frame).err();
                        }
                        continue;
                    }
                };
                return match (cause, refused) {
                    (Some(cause), _) => Err(op.failed(cause)),
                    (None, Some(error)) => Err(error),
                    (None, None) => Ok(consistent),
                };
            }
        }
    }
}

/// Which of `count` requests from sequence number `first` on a message answers.
///
/// `None` is a late answer to a request that was given up.
///
/// # Errors
/// A sequence number that was never sent.
fn answer_index(seq: u32, first: u32, count: usize, op: Op) -> Result<Option<usize>> {
    let distance = seq.wrapping_sub(first);
    match usize::try_from(distance) {
        Ok(index) if index < count => Ok(Some(index)),
        _ if distance > u32::MAX / 2 => Ok(None),
        _ => Err(op.malformed(format!("sequence number {seq} where {first} was asked"))),
    }
}

/// How many of `requests` go into the next send; joined ones stay together.
fn batch_length(requests: &[Request]) -> usize {
    let mut length = requests.len().min(BATCH);
    while length < requests.len()
        && length > 1
        && requests.get(length - 1).is_some_and(|request| request.joined)
    {
        length -= 1;
    }
    length
}
