//! One stream for all watches at an endpoint, as etcd has it: a stream of its own would cost each watch buffers here and
//! at the server, and a question whenever it is silent.
//!
//! ```text
//! open with a watch ──▶ takes more ──one is refused, or waits in vain──▶ takes no more ──the last one is dropped──▶ end
//! ```
//!
//! Watches have ids of our own, by which the server tells what belongs to which. A proxy that gives its own, and answers in
//! an order of its own, is asked for one watch at a time. A stream has the token that it was opened with: what it refuses
//! may be granted on a new one.
//!
//! A stream that is silent is asked for one more watch, of one key, which is cancelled as soon as it is answered. What
//! etcd has for that, a request for progress, newer servers leave unanswered until all watches of the stream have reached
//! their first revision, which in a quiet store they never do
//! ([etcd#20229](https://github.com/etcd-io/etcd/pull/20229)).

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use etcd_client::{
    Client, Error as ClientError, WatchOptions, WatchRequestSender, WatchResponse, WatchResponseStream, WatchStream,
    proto::PbWatchResponse,
};
use foldhash::fast::RandomState;
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc, oneshot},
    time::timeout,
};
use tracing::debug;

use crate::{
    error::{NAME, render},
    space::Range,
    store::LARGEST_ANSWER,
};

/// How long a stream may be silent before it is asked whether it is alive.
const IDLE: Duration = Duration::from_secs(10);
/// The same for one whose token is stale: the server writes each refusal into its log.
const IDLE_REFUSED: Duration = Duration::from_secs(60);
/// How many messages wait for a reader. One that takes none of them for so long is told that it fell behind, and goes on
/// from where it is: the others do not wait for it, nor does the process keep everything for it.
const MOST_WAITING: usize = 1024;

/// What the server answers to a watch: the watch and its first message.
type Begun = (Watch, WatchResponse);

/// The streams at one endpoint.
#[derive(Debug)]
pub(crate) struct Streams {
    /// The one that takes new watches, if it still does. Who finds none opens one, and the others wait for that.
    newest: tokio::sync::Mutex<Option<Arc<Stream>>>,
    limit: Duration,
    runtime: Handle,
}

#[derive(Debug)]
struct Stream {
    /// One that may be watched. It is where a followed range begins, and nobody writes it.
    key: Vec<u8>,
    state: Mutex<State>,
    orders: mpsc::UnboundedSender<Order>,
    /// Somebody was answered.
    answered: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// How many watches were asked for, which is the id of the last one. None of them is the server's to give: one from
    /// 3.5.0 to 3.5.5 that refuses a watch with an id of its own forgets the first that it gave
    /// ([etcd#14296](https://github.com/etcd-io/etcd/issues/14296)).
    count: i64,
    /// Whom the server has not answered yet, in the order in which they asked, and how many of them it was sent.
    asked: VecDeque<Asked>,
    sent: usize,
    /// The server takes our ids.
    takes_ids: bool,
    /// It refused a question.
    refuses: bool,
    watches: HashMap<i64, Watched, RandomState>,
    /// It takes no more watches.
    closed: bool,
    /// Why it is over.
    end: Option<ClientError>,
}

#[derive(Debug)]
struct Asked {
    id: i64,
    start: i64,
    /// `None`: only to see whether the server answers.
    answer: Option<Answering>,
}

type Answering = oneshot::Sender<Result<Begun, ClientError>>;

#[derive(Debug)]
struct Watched {
    messages: mpsc::Sender<Box<WatchResponse>>,
    /// The revision that it has reached.
    at: i64,
}

/// What is to be sent.
#[derive(Debug)]
enum Order {
    Watch(Vec<u8>, WatchOptions),
    Cancel(i64),
    /// Nothing; but perhaps nobody needs the stream any more.
    Look,
}

/// Waits for the server's answer. A stream that lets one wait in vain takes no more.
struct Answer {
    stream: Arc<Stream>,
    answer: oneshot::Receiver<Result<Begun, ClientError>>,
    /// The stream was opened for this.
    fresh: bool,
}

/// One of the watches on a stream. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    id: i64,
    messages: mpsc::Receiver<Box<WatchResponse>>,
    stream: Arc<Stream>,
}

/// Ends the stream with the task, whatever ends that.
struct Ending(Arc<Stream>);

impl Streams {
    /// Streams that are given up if they leave a question unanswered for `limit`.
    pub(crate) fn new(limit: Duration, runtime: Handle) -> Self {
        Self { newest: tokio::sync::Mutex::default(), limit, runtime }
    }

    /// A watch over a range from the revision `start` on, and the server's answer.
    pub(crate) async fn watch(&self, client: &Client, range: &Range, start: i64) -> Result<Begun, ClientError> {
        let mut refusing = None;
        loop {
            let mut answer = self.ask(client, range, start, refusing.as_ref()).await?;
            match (&mut answer.answer).await {
                // That may be for the stream's token. Others may have opened another one meanwhile.
                Ok(Err(refused)) if !answer.fresh => {
                    debug!(backend = NAME, error = %render(&refused), "refused on a stream that is shared");
                    refusing = Some(answer.stream.clone());
                }
                Ok(given) => return given,
                Err(_) => return Err(answer.stream.why()),
            }
        }
    }

    /// Asks for a watch on the newest stream, or opens another one if that takes no more or has refused this one.
    async fn ask(
        &self,
        client: &Client,
        range: &Range,
        start: i64,
        refusing: Option<&Arc<Stream>>,
    ) -> Result<Answer, ClientError> {
        let mut newest = self.newest.lock().await;
        if let Some(stream) = newest.as_ref()
            && !refusing.is_some_and(|refusing| Arc::ptr_eq(refusing, stream))
            && let Some(answer) = stream.ask(range, start)
        {
            return Ok(Answer { stream: stream.clone(), answer, fresh: false });
        }
        let mut watches = client.watch_client().max_decoding_message_size(LARGEST_ANSWER);
        let (mut state, (asked, answer)) = (State { sent: 1, ..State::default() }, oneshot::channel());
        let options = state.asked(range, start, Some(asked));
        let opened = watches.watch(range.0.clone(), Some(options)).await?;
        let (orders, to_send) = mpsc::unbounded_channel();
        let stream = Arc::new(Stream::new(range.0.clone(), state, orders));
        self.runtime.spawn(stream.clone().run(opened, to_send, self.limit));
        *newest = Some(stream.clone());
        Ok(Answer { stream, answer, fresh: true })
    }
}

impl Stream {
    fn new(key: Vec<u8>, state: State, orders: mpsc::UnboundedSender<Order>) -> Self {
        Self { key, state: Mutex::new(state), orders, answered: Notify::new() }
    }

    async fn run(self: Arc<Self>, opened: WatchStream, to_send: mpsc::UnboundedReceiver<Order>, limit: Duration) {
        let stream = Ending(self);
        let (requests, responses) = opened.split();
        // At the same time: a server that waits until it is read from reads nothing.
        let end = tokio::select! {
            end = stream.0.send(requests, to_send) => end,
            end = stream.0.receive(responses, limit) => end,
        };
        debug!(backend = NAME, why = %render(&end), "a stream of watches ended");
        stream.0.end(end);
    }

    /// Sends what is ordered, as long as anybody needs the stream.
    async fn send(&self, mut requests: WatchRequestSender, mut orders: mpsc::UnboundedReceiver<Order>) -> ClientError {
        while let Some(order) = orders.recv().await {
            if let Some(unused) = self.end_if_unused() {
                return unused;
            }
            let sent = match order {
                Order::Watch(from, options) => {
                    while !self.may_send() {
                        self.answered.notified().await;
                    }
                    requests.watch(from, Some(options)).await
                }
                Order::Cancel(id) => requests.cancel(id).await,
                Order::Look => Ok(()),
            };
            if let Err(error) = sent {
                return error;
            }
        }
        over("nothing is sent any more")
    }

    /// Gives everyone what is theirs. A stream that is silent is asked whether it lives; one that does not answer is over.
    async fn receive(self: &Arc<Self>, mut responses: WatchResponseStream, limit: Duration) -> ClientError {
        let (mut asked, mut patience) = (false, IDLE);
        loop {
            match timeout(patience, responses.message()).await {
                Ok(Ok(Some(message))) => {
                    self.give(message);
                    (asked, patience) = (false, if self.state().refuses { IDLE_REFUSED } else { IDLE });
                }
                Ok(Ok(None)) => return over("the stream ended"),
                Ok(Err(error)) => return error,
                Err(_) if asked => return over(&format!("no answer within {limit:?}")),
                Err(_) => {
                    self.question();
                    (asked, patience) = (true, limit);
                }
            }
        }
    }

    fn give(self: &Arc<Self>, message: WatchResponse) {
        if message.created() || message.canceled() && message.watch_id() < 0 {
            self.answer(message);
            return;
        }
        let id = message.watch_id();
        let mut state = self.state();
        let Some(watched) = state.watches.get_mut(&id) else { return };
        let revision = match message.events().last().and_then(|event| event.kv()) {
            Some(kv) => kv.mod_revision(),
            None => message.header().map_or(0, |header| header.revision()),
        };
        watched.at = watched.at.max(revision);
        let over = message.canceled();
        // A server keeps what it has cancelled itself, too, until it is told to.
        if watched.messages.try_send(Box::new(message)).is_err() || over {
            state.watches.remove(&id);
            drop(state);
            self.order(Order::Cancel(id));
        }
    }

    /// The server answered one of those who asked: the one with this id, or else the first.
    fn answer(self: &Arc<Self>, message: WatchResponse) {
        let id = message.watch_id();
        let mut state = self.state();
        let of_this_id = state.asked.iter().position(|asked| asked.id == id);
        state.takes_ids |= of_this_id.is_some();
        let Some(Asked { start, answer, .. }) = state.asked.remove(of_this_id.unwrap_or(0)) else { return };
        state.sent = state.sent.saturating_sub(1);
        self.answered.notify_one();
        let refused = ended(&message);
        let Some(answer) = answer else {
            state.tell_those_ahead(&message);
            if refused.is_some() {
                // So it would any other watch.
                (state.refuses, state.closed) = (true, true);
            }
            drop(state);
            self.order(if refused.is_some() { Order::Look } else { Order::Cancel(id) });
            return;
        };
        if let Some(refused) = refused {
            drop(state);
            drop(answer.send(Err(refused)));
            self.order(Order::Look);
            return;
        }
        let (messages, waiting) = mpsc::channel(MOST_WAITING);
        state.watches.insert(id, Watched { messages, at: start.saturating_sub(1) });
        drop(state);
        // If nobody waits for it any more, the watch is dropped here.
        drop(answer.send(Ok((Watch { id, messages: waiting, stream: self.clone() }, message))));
    }

    /// Asks for one more watch, if the stream takes more.
    fn ask(&self, range: &Range, start: i64) -> Option<oneshot::Receiver<Result<Begun, ClientError>>> {
        let (asked, answer) = oneshot::channel();
        let mut state = self.state();
        if state.closed || state.end.is_some() {
            return None;
        }
        // Under the lock, so that it is sent in the order in which answers are expected.
        let options = state.asked(range, start, Some(asked));
        self.order(Order::Watch(range.0.clone(), options));
        Some(answer)
    }

    /// Asks for something that the server answers whatever there is. A refusal is an answer, too.
    fn question(&self) {
        let mut state = self.state();
        // Whoever asked before is waited for as well.
        if state.asked.is_empty() {
            let options = state.asked(&(self.key.clone(), Vec::new()), 0, None);
            self.order(Order::Watch(self.key.clone(), options));
        }
    }

    /// Whether one more may be on its way to the server, and if so, notes that it is.
    fn may_send(&self) -> bool {
        let mut state = self.state();
        let may = state.takes_ids || state.sent == 0;
        state.sent += usize::from(may);
        may
    }

    fn order(&self, order: Order) {
        // If nobody sends any more, the stream is over.
        let _ = self.orders.send(order);
    }

    fn end_if_unused(&self) -> Option<ClientError> {
        let mut state = self.state();
        let unused = state.asked.is_empty() && state.watches.is_empty();
        unused.then(|| copy(state.end.insert(over("nobody needs it any more"))))
    }

    fn end(&self, why: ClientError) {
        let mut state = self.state();
        state.end.get_or_insert(why);
        state.asked.clear();
        state.watches.clear();
    }

    /// Why it is over, or why else a watch on it may have ended.
    fn why(&self) -> ClientError {
        self.state().end.as_ref().map_or_else(|| over("it fell behind"), copy)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Notes who asks, and gives what to ask for.
    fn asked(&mut self, (_, to): &Range, start: i64, answer: Option<Answering>) -> WatchOptions {
        self.count += 1;
        self.asked.push_back(Asked { id: self.count, start, answer });
        // No fragments: the client does not tell whether a message is the last part of its revision.
        let options = WatchOptions::new().with_watch_id(self.count).with_start_revision(start).with_progress_notify();
        if to.is_empty() { options } else { options.with_range(to.clone()) }
    }

    /// That the server is where it is is news for those who have seen more than it has.
    fn tell_those_ahead(&self, answer: &WatchResponse) {
        let revision = answer.header().map_or(0, |header| header.revision());
        let news = WatchResponse(PbWatchResponse { canceled: false, ..answer.0.clone() });
        for watched in self.watches.values().filter(|watched| watched.at > revision) {
            // One that has no room has something to look at anyway.
            let _ = watched.messages.try_send(Box::new(news.clone()));
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end(over("its task ended"));
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.answer.is_terminated() {
            self.stream.state().closed = true;
        }
    }
}

impl Watch {
    /// The next message; one that ends the watch is an error.
    pub(crate) async fn message(&mut self) -> Result<WatchResponse, ClientError> {
        let message = self.messages.recv().await.ok_or_else(|| self.stream.why())?;
        ended(&message).map_or(Ok(*message), Err)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.stream.state().watches.remove(&self.id).is_some() {
            self.stream.order(Order::Cancel(self.id));
        }
    }
}

/// Why a message ends its watch, if it does.
fn ended(message: &WatchResponse) -> Option<ClientError> {
    message.canceled().then(|| match message.compact_revision() {
        // With an empty reason, if it is this.
        1.. => over("the required revision has been compacted"),
        _ => over(message.cancel_reason()),
    })
}

fn over(why: &str) -> ClientError {
    ClientError::WatchError(why.to_owned())
}

/// What ended all watches of a stream, for one of them.
fn copy(error: &ClientError) -> ClientError {
    match error {
        ClientError::GRpcStatus(status) => ClientError::GRpcStatus(status.clone()),
        ClientError::WatchError(why) => over(why),
        other => over(&render(other)),
    }
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::{PbEvent, PbKeyValue, PbResponseHeader};
    use futures::FutureExt;

    use super::*;

    const START: i64 = 10;

    fn stream() -> (Arc<Stream>, mpsc::UnboundedReceiver<Order>) {
        let (orders, ordered) = mpsc::unbounded_channel();
        (Arc::new(Stream::new(b"a".to_vec(), State::default(), orders)), ordered)
    }

    fn ask(stream: &Arc<Stream>) -> Option<Answer> {
        let answer = stream.ask(&(b"a".to_vec(), b"b".to_vec()), START)?;
        Some(Answer { stream: stream.clone(), answer, fresh: false })
    }

    fn now<T>(future: impl Future<Output = T>) -> T {
        future.now_or_never().expect("it is there")
    }

    fn message(id: i64, revision: i64) -> PbWatchResponse {
        let header = Some(PbResponseHeader { revision, ..Default::default() });
        PbWatchResponse { header, watch_id: id, ..Default::default() }
    }

    fn created(id: i64) -> WatchResponse {
        WatchResponse(PbWatchResponse { created: true, ..message(id, START) })
    }

    fn refused(id: i64) -> WatchResponse {
        let why = "permission denied".to_owned();
        WatchResponse(PbWatchResponse { created: true, canceled: true, cancel_reason: why, ..message(id, START) })
    }

    fn change(id: i64, mod_revision: i64) -> WatchResponse {
        let kv = Some(PbKeyValue { mod_revision, ..Default::default() });
        let events = vec![PbEvent { kv, ..Default::default() }];
        WatchResponse(PbWatchResponse { events, ..message(id, mod_revision) })
    }

    fn begin(stream: &Arc<Stream>, id: i64) -> Watch {
        let mut answer = ask(stream).unwrap();
        stream.give(created(id));
        now(&mut answer.answer).unwrap().unwrap().0
    }

    fn ordered(orders: &mut mpsc::UnboundedReceiver<Order>) -> String {
        let orders: Vec<_> = std::iter::from_fn(|| orders.try_recv().ok()).collect();
        let names = orders.iter().map(|order| match order {
            Order::Watch(..) => "watch".to_owned(),
            Order::Cancel(id) => format!("cancel {id}"),
            Order::Look => "look".to_owned(),
        });
        names.collect::<Vec<_>>().join(", ")
    }

    /// What three who ask get from these answers, and whether all three may be asked for at once.
    fn answered(answers: [WatchResponse; 3]) -> (Vec<Option<i64>>, bool) {
        let (stream, _orders) = stream();
        let mut asked: Vec<_> = (0..3).map(|_| ask(&stream).unwrap()).collect();
        assert!(stream.may_send() && !stream.may_send(), "the first alone");
        answers.into_iter().for_each(|answer| stream.give(answer));
        let at_once = stream.may_send() && stream.may_send();
        let given: Vec<_> = asked.iter_mut().map(|asked| now(&mut asked.answer).unwrap()).collect();
        assert!(ask(&stream).is_some(), "one that is refused ends nothing");
        (given.iter().map(|given| given.as_ref().ok().map(|(watch, _)| watch.id)).collect(), at_once)
    }

    #[test]
    fn answers_go_to_those_who_asked() {
        // By our ids, in whatever order.
        assert_eq!(answered([created(1), created(3), created(2)]), (vec![Some(1), Some(2), Some(3)], true));
        // A refusal has the id or none.
        assert_eq!(answered([created(1), refused(2), created(3)]), (vec![Some(1), None, Some(3)], true));
        assert_eq!(answered([created(1), refused(-1), created(3)]), (vec![Some(1), None, Some(3)], true));
        // In the order in which they asked, where the ids are others.
        assert_eq!(answered([created(10), refused(-1), created(11)]), (vec![Some(10), None, Some(11)], false));
    }

    #[test]
    fn each_watch_hears_its_own_until_it_is_dropped() {
        let (stream, mut orders) = stream();
        let (mut one, mut other) = (begin(&stream, 0), begin(&stream, 1));
        stream.give(change(1, 11));
        stream.give(change(2, 12));
        assert_eq!(now(other.message()).unwrap().events().len(), 1);
        assert!(one.message().now_or_never().is_none() && other.message().now_or_never().is_none());
        drop(one);
        stream.give(change(0, 13));
        assert_eq!(ordered(&mut orders), "watch, watch, cancel 0");
        assert!(stream.end_if_unused().is_none());
        drop(other);
        assert!(stream.end_if_unused().is_some() && ask(&stream).is_none());
    }

    #[test]
    fn the_answer_to_a_question_is_for_those_who_have_seen_more() {
        let (stream, mut orders) = stream();
        let (mut one, mut other) = (begin(&stream, 1), begin(&stream, 2));
        stream.give(change(2, 20));
        now(other.message()).unwrap();
        for (answer, then) in [(created(3), "watch, cancel 3"), (refused(4), "watch, look")] {
            ordered(&mut orders);
            stream.question();
            stream.give(answer);
            assert_eq!(ordered(&mut orders), then);
            assert_eq!(now(other.message()).unwrap().header().unwrap().revision(), START);
            // It has seen the revision before its first.
            assert!(one.message().now_or_never().is_none());
        }
    }

    #[test]
    fn while_a_watch_is_asked_for_that_is_the_question() {
        let (stream, mut orders) = stream();
        let _asked = ask(&stream).unwrap();
        stream.question();
        assert_eq!(ordered(&mut orders), "watch");
    }

    #[test]
    fn every_watch_has_an_id_of_its_own_from_one_on() {
        let (stream, mut orders) = stream();
        let _asked = (ask(&stream).unwrap(), ask(&stream).unwrap());
        let sent = std::iter::from_fn(|| orders.try_recv().ok());
        let ids: Vec<_> = sent.map(|order| format!("{order:?}")).collect();
        for (order, id) in ids.iter().zip(1..) {
            assert!(order.contains(&format!("watch_id: {id},")), "{order}");
        }
        assert_eq!(ids.len(), 2);
    }

    #[test]
    fn a_watch_that_the_store_ends_ends_alone() {
        let (stream, mut orders) = stream();
        let (mut one, mut other) = (begin(&stream, 0), begin(&stream, 1));
        let compacted = PbWatchResponse { canceled: true, compact_revision: 30, ..message(0, 31) };
        stream.give(WatchResponse(compacted));
        assert!(now(one.message()).unwrap_err().to_string().contains("has been compacted"));
        drop(one);
        assert_eq!(ordered(&mut orders), "watch, watch, cancel 0");
        stream.give(change(1, 32));
        now(other.message()).unwrap();
    }

    #[test]
    fn who_takes_nothing_falls_behind_alone_and_loses_nothing_that_came_before() {
        let (stream, mut orders) = stream();
        let (mut idle, mut other) = (begin(&stream, 0), begin(&stream, 1));
        for at in 0..=MOST_WAITING as i64 {
            stream.give(change(0, START + at));
            stream.give(change(1, START + at));
            now(other.message()).unwrap();
        }
        for _ in 0..MOST_WAITING {
            now(idle.message()).unwrap();
        }
        assert!(now(idle.message()).unwrap_err().to_string().contains("fell behind"));
        assert_eq!(ordered(&mut orders), "watch, watch, cancel 0");
    }

    #[test]
    fn a_stream_that_lets_one_wait_in_vain_takes_no_more_and_keeps_what_it_has() {
        let (stream, mut orders) = stream();
        let mut one = begin(&stream, 0);
        drop(ask(&stream).unwrap());
        assert!(ask(&stream).is_none());
        // The answer comes late, and nobody is there for it.
        stream.give(created(1));
        assert_eq!(ordered(&mut orders), "watch, watch, cancel 1");
        stream.give(change(0, 11));
        now(one.message()).unwrap();
    }

    #[test]
    fn the_end_of_a_stream_is_told_to_everyone() {
        let (stream, _orders) = stream();
        let (mut watch, mut answer) = (begin(&stream, 0), ask(&stream).unwrap());
        drop(Ending(stream.clone()));
        assert!(now(watch.message()).unwrap_err().to_string().contains("its task ended"));
        assert!(now(&mut answer.answer).is_err() && stream.why().to_string().contains("its task ended"));
        assert!(ask(&stream).is_none());
    }
}
