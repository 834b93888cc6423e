//! As much HTTP as it takes to ask a server how it is.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// Short: etcd leaves a question unanswered that reaches it in the middle of an election, and answers the next one.
const WITHIN: Duration = Duration::from_millis(500);

/// The body of the answer to a `GET`.
pub(super) async fn get(addr: SocketAddr, path: &str) -> io::Result<String> {
    ask(addr, format!("GET {path} HTTP/1.0\r\n\r\n")).await
}

/// The body of the answer to a `POST` of JSON.
pub(super) async fn post(addr: SocketAddr, path: &str, body: &str) -> io::Result<String> {
    let length = body.len();
    ask(
        addr,
        format!("POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"),
    )
    .await
}

/// Version 1.0, so that the answer is in one piece and ends with the connection.
async fn ask(addr: SocketAddr, request: String) -> io::Result<String> {
    let exchange = async {
        let mut socket = TcpStream::connect(addr).await?;
        socket.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let answer = timeout(WITHIN, exchange).await??;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(body.to_owned())
}
