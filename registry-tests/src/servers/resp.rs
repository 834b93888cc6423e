//! As much of Redis' protocol as it takes to ask a server something.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

/// A server that is up answers within a millisecond, and a frozen one is not waited for.
const WITHIN: Duration = Duration::from_millis(500);

/// The values of an answer in order, those of nested lists too. `None` is a value that is not there.
pub(crate) type Answer = Vec<Option<Vec<u8>>>;

/// What a server answers to a command, asked over a connection of its own. An error that it answers is one of kind
/// [`Other`](ErrorKind::Other), with its words.
pub(crate) async fn ask<A: AsRef<[u8]>>(server: SocketAddr, command: &[A]) -> io::Result<Answer> {
    timeout(WITHIN, ask_patiently(server, command)).await?
}

/// [`ask`] for commands whose words are separated by spaces, and answers that are text, a value a line.
pub(crate) async fn ask_text(server: SocketAddr, command: &str) -> io::Result<String> {
    let words: Vec<_> = command.split(' ').collect();
    let answer = ask(server, &words).await?;
    let lines = answer.iter().map(|value| String::from_utf8_lossy(value.as_deref().unwrap_or_default()));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// [`ask`] without a deadline of its own.
pub(crate) async fn ask_patiently<A: AsRef<[u8]>>(server: SocketAddr, command: &[A]) -> io::Result<Answer> {
    let mut socket = BufReader::new(TcpStream::connect(server).await?);
    let mut request = format!("*{}\r\n", command.len()).into_bytes();
    for argument in command {
        request.extend(format!("${}\r\n", argument.as_ref().len()).bytes());
        request.extend_from_slice(argument.as_ref());
        request.extend(b"\r\n");
    }
    socket.write_all(&request).await?;
    let (mut answer, mut expected) = (Answer::new(), 1);
    while expected > 0 {
        expected -= 1;
        let line = line(&mut socket).await?;
        let (kind, rest) = line.split_at_checked(1).ok_or(ErrorKind::InvalidData)?;
        match (kind, rest.parse::<usize>()) {
            ("+" | ":", _) => answer.push(Some(rest.as_bytes().to_vec())),
            ("-", _) => return Err(io::Error::other(rest)),
            ("$", Ok(length)) => answer.push(Some(bulk(&mut socket, length).await?)),
            ("*", Ok(length)) => expected += length,
            ("$" | "*", Err(_)) if rest == "-1" => answer.push(None),
            _ => return Err(ErrorKind::InvalidData.into()),
        }
    }
    Ok(answer)
}

async fn line(socket: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    socket.read_line(&mut line).await?;
    line.strip_suffix("\r\n").map(str::to_owned).ok_or_else(|| ErrorKind::UnexpectedEof.into())
}

async fn bulk(socket: &mut BufReader<TcpStream>, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length + 2];
    socket.read_exact(&mut bytes).await?;
    bytes.truncate(length);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// What is made of this answer, and what was asked.
    async fn answered(with: &'static [u8]) -> (io::Result<Answer>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        let serve = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 64];
            let length = socket.read(&mut request).await.unwrap();
            socket.write_all(with).await.unwrap();
            request.truncate(length);
            request
        };
        tokio::join!(ask(server, &["GET", "a b"]), serve)
    }

    #[tokio::test]
    async fn nested_answers_are_flattened_and_what_is_missing_keeps_its_place() {
        let (answer, request) = answered(b"*3\r\n*2\r\n:7\r\n$-1\r\n$3\r\na\r\n\r\n+OK\r\n").await;
        assert_eq!(request, b"*2\r\n$3\r\nGET\r\n$3\r\na b\r\n");
        let expected = [Some(b"7".to_vec()), None, Some(b"a\r\n".to_vec()), Some(b"OK".to_vec())];
        assert_eq!(answer.unwrap(), expected);
        assert_eq!(answered(b"*0\r\n").await.0.unwrap(), []);
    }

    #[tokio::test]
    async fn errors_and_broken_answers_are_errors() {
        assert_eq!(answered(b"-NOAUTH who\r\n").await.0.unwrap_err().to_string(), "NOAUTH who");
        for broken in [&b"$5\r\nabc"[..], b"", b"\r\n", b"$x\r\n", b"!\r\n", b"\xff\r\n"] {
            assert_ne!(answered(broken).await.0.unwrap_err().kind(), ErrorKind::Other);
        }
    }
}
