//! A server that is too old. Nobody packages one any more, so this is as much of it as we meet.

use std::{error::Error as StdError, io, net::SocketAddr};

use registry_core::{Error, ErrorKind};
use registry_tests::conformance::support::{in_time, instance};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::{SECOND, client, config, options};

const PING: i32 = 11;
const CLOSE: i32 = -11;
const UNIMPLEMENTED: i32 = -6;

/// A server that keeps sessions, knows no request, and says of itself what it is told to.
async fn server(srvr: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((socket, _)) = listener.accept().await {
            connections.spawn(serve(socket, srvr));
        }
    });
    addr
}

async fn serve(mut socket: TcpStream, srvr: &str) -> io::Result<()> {
    let mut word = [0; 4];
    socket.read_exact(&mut word).await?;
    if &word == b"srvr" {
        return socket.write_all(srvr.as_bytes()).await;
    }
    // To connect: the version of the protocol, the latest change that was seen, then the ttl.
    let connect = body(&mut socket, i32::from_be_bytes(word)).await?;
    let mut session = 0_i32.to_be_bytes().to_vec();
    session.extend(&connect[12..16]);
    session.extend(0x1_0000_i64.to_be_bytes());
    session.extend(16_i32.to_be_bytes());
    session.extend([7; 16]);
    answer(&mut socket, &session).await?;
    loop {
        let length = socket.read_i32().await?;
        let request = body(&mut socket, length).await?;
        let (number, operation) = (&request[..4], i32::from_be_bytes(request[4..8].try_into().unwrap()));
        let known = matches!(operation, PING | CLOSE);
        let outcome: i32 = if known { 0 } else { UNIMPLEMENTED };
        answer(&mut socket, &[number, &1_i64.to_be_bytes(), &outcome.to_be_bytes()].concat()).await?;
    }
}

async fn body(socket: &mut TcpStream, length: i32) -> io::Result<Vec<u8>> {
    let mut body = vec![0; usize::try_from(length).unwrap()];
    socket.read_exact(&mut body).await?;
    Ok(body)
}

async fn answer(socket: &mut TcpStream, body: &[u8]) -> io::Result<()> {
    let length = i32::try_from(body.len()).unwrap().to_be_bytes();
    socket.write_all(&[&length, body].concat()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_too_old_is_refused_with_its_version() {
    let told = "Zookeeper version: 3.4.14-4c25d480e66aadd371de8bd2fd8da255ac140bcf, built on 03/06/2019\nMode: x\n";
    let untold = "srvr is not executed because it is not in the whitelist.\n";
    for (srvr, expected) in [
        (told, "ZooKeeper 3.6 or later is needed, this is 3.4.14"),
        (untold, "ZooKeeper 3.6 or later is needed, this is an older one"),
    ] {
        let one = client(config([server(srvr).await], options()));
        let (discover, watch, register) = tokio::join!(
            in_time("discover", 2 * SECOND, one.registry.discover("orders")),
            in_time("watch", 2 * SECOND, one.registry.watch("orders")),
            in_time("register", 2 * SECOND, one.registry.register(instance("orders", "1"))),
        );
        let errors: [Error; 3] = [discover.unwrap_err(), watch.unwrap_err(), register.unwrap_err()];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
            assert_eq!(error.source().unwrap().to_string(), expected, "{error:?}");
        }
        assert!(one.registry.registrations().is_empty(), "what is refused is withdrawn");
    }
}
