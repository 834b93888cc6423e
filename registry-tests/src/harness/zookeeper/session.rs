//! Ends other clients' sessions. No command of ZooKeeper's does: whoever knows a session's password may take it over
//! and close it, and a server makes the password from the session's number.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// `ZooKeeperServer.superSecret`, the same at every server.
const SECRET: i64 = 0xB341_5C00;
const CLOSE_SESSION: i32 = -11;
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Asks the server to close a session. Nothing happens if there is none of this number.
pub(super) async fn close(server: SocketAddr, session: i64) -> io::Result<()> {
    let exchange = async {
        let mut socket = TcpStream::connect(server).await?;
        socket.write_all(&requests(session)).await?;
        // It answers, and hangs up.
        socket.read_to_end(&mut Vec::new()).await
    };
    timeout(ANSWER_WITHIN, exchange).await?.map(drop)
}

/// To connect as this session and to close it, without waiting in between: the session's own client would be back.
fn requests(session: i64) -> Vec<u8> {
    let mut connect = Vec::new();
    connect.extend(0_i32.to_be_bytes()); // version of the protocol
    connect.extend(0_i64.to_be_bytes()); // latest change that we have seen
    connect.extend(30_000_i32.to_be_bytes()); // ttl in milliseconds
    connect.extend(session.to_be_bytes());
    connect.extend(16_i32.to_be_bytes());
    connect.extend(password(session));
    connect.push(0); // not read-only
    let mut close = 1_i32.to_be_bytes().to_vec(); // number of the request
    close.extend(CLOSE_SESSION.to_be_bytes());
    [frame(&connect), frame(&close)].concat()
}

fn frame(request: &[u8]) -> Vec<u8> {
    let length = i32::try_from(request.len()).expect("requests are short");
    [&length.to_be_bytes(), request].concat()
}

/// `ZooKeeperServer.generatePasswd`: the first bytes of a `java.util.Random`.
fn password(session: i64) -> [u8; 16] {
    const MULTIPLIER: u64 = 0x5_DEEC_E66D;
    const MASK: u64 = (1 << 48) - 1;
    let mut state = ((session ^ SECRET).cast_unsigned() ^ MULTIPLIER) & MASK;
    let mut password = [0; 16];
    for piece in password.chunks_exact_mut(4) {
        state = state.wrapping_mul(MULTIPLIER).wrapping_add(0xB) & MASK;
        piece.copy_from_slice(&(state >> 16).to_le_bytes()[..4]);
    }
    password
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first four numbers of `new Random(0)`.
    #[test]
    fn passwords_are_javas_random_bytes() {
        let numbers: Vec<_> =
            password(SECRET).chunks(4).map(|bytes| i32::from_le_bytes(bytes.try_into().expect("four"))).collect();
        assert_eq!(numbers, [-1_155_484_576, -723_955_400, 1_033_096_058, -1_690_734_402]);
    }
}
