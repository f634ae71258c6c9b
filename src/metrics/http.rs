//! Serves the metrics over HTTP/1.1, on the runtime's thread: no client ever meets a worker.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName,
    REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::text::Format;
use super::{Metrics, page};
use crate::error::{Error, Result};

/// Connections at once; the oldest makes room for one more, so that idle and slow ones keep no client
/// out, and leave the workers their descriptors where only 64 are allowed.
const CONNECTIONS: usize = 16;
/// A request's head must be there within this time; likewise the next on the same connection.
const HEAD: Duration = Duration::from_secs(10);
/// No connection lasts longer: a client may read its answer as slowly as it likes until then.
const LIFE: Duration = Duration::from_secs(300);
/// Bytes of a request's head, at most; the least that hyper takes.
const BUFFER: usize = 8192;
/// After a failed accept (no descriptors left).
const PAUSE: Duration = Duration::from_millis(100);

/// Begins to listen, and says where.
///
/// # Errors
/// The address is taken or not there: a usage error that names it.
pub(crate) async fn bind(address: SocketAddr) -> Result<TcpListener> {
    let refused = |error: std::io::Error| {
        let taken = error.kind() == std::io::ErrorKind::AddrInUse;
        let whose = if taken { " (by another ctkeep?)" } else { "" };
        Error::usage(
            "--metrics-listen",
            format!("cannot listen on {address}: {error}{whose}; name another address, or off"),
        )
    };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    tracing::info!(%address, "serving metrics");
    Ok(listener)
}

/// Serves for ever.
pub(crate) async fn serve(listener: TcpListener, metrics: Arc<Metrics>) {
    let mut connections: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                connections.retain(|connection| !connection.is_finished());
                if connections.len() >= CONNECTIONS {
                    end_oldest(&mut connections);
                }
                let task = tokio::spawn(converse(stream, metrics.clone()));
                connections.push_back(task.abort_handle());
            }
            Err(error) => {
                tracing::debug!(%error, "connection not accepted");
                end_oldest(&mut connections);
                sleep(PAUSE).await;
            }
        }
    }
}

fn end_oldest(connections: &mut VecDeque<AbortHandle>) {
    if let Some(oldest) = connections.pop_front() {
        oldest.abort();
    }
}

/// Answers one client until it has enough, or too little to say.
pub async fn converse<S>(stream: S, metrics: Arc<Metrics>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let response = answer(&request, &metrics);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    // What a client does wrong is its own affair.
    let _ = timeout(LIFE, connection).await;
}

/// Nothing of a request but its method, path and Accept header is looked at; a body is never read.
fn answer<B>(request: &Request<B>, metrics: &Metrics) -> Response<Full<Bytes>> {
    const HTML: &str = "text/html; charset=utf-8";
    const PLAIN: &str = "text/plain; charset=utf-8";

    let known = matches!(request.uri().path(), "/" | "/metrics" | "/healthz");
    if known && !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "GET and HEAD only\n");
        set(&mut response, ALLOW, "GET, HEAD");
        return response;
    }
    match request.uri().path() {
        "/metrics" => {
            // There may be several such headers.
            let accept = request.headers().get_all(ACCEPT).iter();
            let accept: Vec<_> = accept.filter_map(|value| value.to_str().ok()).collect();
            let format = Format::preferred(&accept.join(","));
            let written = metrics.written();
            let body = match format {
                Format::OpenMetrics => written.open_metrics,
                Format::Text => written.text,
            };
            let mut response = respond(StatusCode::OK, format.content_type(), body);
            set(&mut response, VARY, "Accept");
            response
        }
        "/healthz" => match metrics.health() {
            Ok(()) => respond(StatusCode::OK, PLAIN, "ok\n"),
            Err(why) => respond(StatusCode::SERVICE_UNAVAILABLE, PLAIN, format!("{why}\n")),
        },
        "/" => {
            let mut response = respond(StatusCode::OK, HTML, page::write(metrics));
            set(&mut response, CONTENT_SECURITY_POLICY, page::POLICY);
            set(&mut response, REFERRER_POLICY, "no-referrer");
            response
        }
        _ => {
            respond(StatusCode::NOT_FOUND, PLAIN, "not found; there are /, /metrics and /healthz\n")
        }
    }
}

fn respond(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    set(&mut response, CONTENT_TYPE, content_type);
    set(&mut response, CACHE_CONTROL, "no-store");
    set(&mut response, X_CONTENT_TYPE_OPTIONS, "nosniff");
    response
}

fn set<B>(response: &mut Response<B>, name: HeaderName, value: &'static str) {
    response.headers_mut().insert(name, hyper::header::HeaderValue::from_static(value));
}
