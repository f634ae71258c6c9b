//! Several requests in one send, one result for each.

use super::*;

fn many(count: usize) -> Vec<Request> {
    (0..count).map(|_| question("batch")).collect()
}

#[test]
fn an_error_in_the_middle_does_not_stop_the_rest() {
    let mut conversation = conversation(vec![datagrams([ack(1), refusal(2, ENOENT), ack(3)])]);
    let outcomes = conversation.batch(&many(3), |_, _| Ok(())).unwrap();
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok());
    assert!(outcomes[1].as_ref().unwrap_err().is_absent());
}

#[test]
fn every_answer_comes_with_the_index_of_its_question_however_many_sends_it_takes() {
    // Request n is answered by n % 3 messages.
    let mut conversation = Conversation::new(obliging(|request| {
        let n = request.seq - 1;
        Ok((0..n % 3).map(|_| message(KIND, 0, request.seq, &n.to_ne_bytes())).collect())
    }));
    let mut answers = vec![0; 1000];
    let outcomes = conversation
        .batch(&many(1000), |index, frame| {
            assert_eq!(u32_at(frame.payload, 0) as usize, index);
            answers[index] += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(outcomes.len(), 1000);
    assert!(outcomes.iter().all(Result::is_ok));
    assert!(answers.iter().enumerate().all(|(index, count)| index % 3 == *count));
}

#[test]
fn an_answer_that_cannot_be_used_fails_its_own_question_only() {
    let mut conversation =
        Conversation::new(obliging(|request| Ok(vec![message(KIND, 0, request.seq, &[])])));
    let outcomes = conversation
        .batch(&many(3), |index, _| match index {
            1 => Err(Op::new("batch").malformed("one")),
            _ => Ok(()),
        })
        .unwrap();
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok());
    assert!(is_malformed(outcomes[1].as_ref().unwrap_err()));
}

#[test]
fn an_answer_that_is_missing_in_the_middle_is_an_error() {
    let error =
        conversation(vec![datagrams([ack(1), ack(3)])]).batch(&many(3), |_, _| Ok(())).unwrap_err();
    assert!(is_overrun(&error), "{error}");
}

#[test]
fn an_answer_that_is_missing_at_the_end_is_an_error() {
    let error =
        conversation(vec![datagrams([ack(1), ack(2)])]).batch(&many(3), |_, _| Ok(())).unwrap_err();
    assert!(is_late(&error), "{error}");
}

#[test]
fn an_acknowledgement_that_comes_twice_is_no_second_one() {
    let error = conversation(vec![datagrams([ack(1), ack(1), ack(2)])])
        .batch(&many(3), |_, _| Ok(()))
        .unwrap_err();
    assert!(is_overrun(&error), "{error}");
}

#[test]
fn a_batch_after_a_failed_one_is_not_disturbed_by_its_answers() {
    let mut conversation = Conversation::new(script(|datagram| {
        let first = requests(datagram)[0].seq;
        match first {
            1 => vec![Reply::Datagram(ack(1)), Reply::Errno(ENOBUFS)],
            _ => datagrams([refusal(2, EPERM), ack(3), ack(first), ack(first + 1)]),
        }
    }));
    assert!(is_overrun(&conversation.batch(&many(3), |_, _| Ok(())).unwrap_err()));
    let outcomes = conversation.batch(&many(2), |_, _| Ok(())).unwrap();
    assert!(outcomes.iter().all(Result::is_ok));
}

#[test]
fn no_requests_are_no_send() {
    let mut conversation = Conversation::new(script(|_| panic!("a send")));
    assert!(conversation.batch(&[], |_, _| Ok(())).unwrap().is_empty());
}

#[test]
fn messages_of_odd_length_are_padded_but_not_prolonged() {
    let mut conversation = Conversation::new(script(|datagram| {
        assert_eq!(datagram.len() % 4, 0);
        let lengths: Vec<usize> =
            requests(datagram).iter().map(|request| request.body.len()).collect();
        assert_eq!(lengths, [0, 1, 2, 3, 4]);
        datagrams((1..=5).map(ack))
    }));
    let requests: Vec<_> =
        (0..5).map(|length| Request { body: vec![9; length], ..question("odd") }).collect();
    conversation.batch(&requests, |_, _| Ok(())).unwrap();
}

/// How many messages each send had.
fn sends(requests: &[Request]) -> Vec<Vec<Vec<u8>>> {
    let sends = Rc::new(RefCell::new(Vec::new()));
    let seen = sends.clone();
    let mut conversation = Conversation::new(script(move |datagram| {
        let requests = self::requests(datagram);
        let acks = datagrams(requests.iter().map(|request| ack(request.seq)));
        seen.borrow_mut().push(requests.into_iter().map(|request| request.body).collect());
        acks
    }));
    let outcomes = conversation.batch(requests, |_, _| Ok(())).unwrap();
    assert_eq!(outcomes.len(), requests.len());
    sends.take()
}

#[test]
fn a_send_has_at_most_sixty_four_messages() {
    let sends = sends(&many(1000));
    assert!(sends.iter().all(|send| send.len() <= 64));
    assert_eq!(sends.iter().map(Vec::len).sum::<usize>(), 1000);
    assert_eq!(sends.len(), 16);
}

#[test]
fn joined_requests_travel_in_one_send_wherever_they_stand() {
    // Pairs behind 0 to 70 single requests, so that every place of a pair meets the border.
    for singles in 0..70 {
        let mut requests = many(singles);
        for _ in 0..40 {
            requests.push(Request { joined: true, body: vec![1; 4], ..question("delete") });
            requests.push(Request { body: vec![2; 4], ..question("insert") });
        }
        for send in sends(&requests) {
            assert!(send.len() <= 64);
            assert_ne!(send[0], [2; 4], "{singles} singles: an insert without its delete");
            assert_ne!(send[send.len() - 1], [1; 4], "{singles} singles: torn pair");
        }
    }
}
