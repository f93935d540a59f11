//! One GET to a running evergate's admin address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// For the whole answer; below the three seconds a container's health check usually has.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Longest answer: thousands of backends fit.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Asks `address` for `path`.
///
/// # Errors
/// One line for people: nobody there, no answer in time, or not evergate.
pub(super) fn get(address: SocketAddr, path: &str) -> Result<(StatusCode, Bytes), String> {
    let address = reachable(address);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot ask anybody: {error}"))?;
    runtime.block_on(async {
        match tokio::time::timeout(TIMEOUT, exchange(address, path)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(format!(
                "evergate does not answer at {address}: {error} (is it running? --admin says where)"
            )),
            Err(_elapsed) => Err(format!("evergate does not answer at {address} within {TIMEOUT:?}")),
        }
    })
}

async fn exchange(
    address: SocketAddr,
    path: &str,
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path).header(HOST, address.to_string()).body(Empty::<Bytes>::new())?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await?.to_bytes();
        Ok((status, body))
    };
    tokio::pin!(answer);
    tokio::select! {
        answer = answer.as_mut() => return answer,
        // The connection may end first; the answer then holds what it brought, or the error.
        _ended = connection => {}
    }
    answer.await
}

/// An address to listen on everywhere is reached on this machine.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V4(_) | IpAddr::V6(_) => {}
    }
    address
}
