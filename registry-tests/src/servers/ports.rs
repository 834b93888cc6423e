//! Ports that stay a server's own while it is down, though many test processes choose at the same time.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use rand::Rng;

use super::{Error, Result};

/// Below the ports that systems hand out by themselves: 32768 and up on Linux, 49152 and up elsewhere.
const RANGE: std::ops::Range<u16> = 15_000..32_000;
const TRIES: usize = 10_000;

/// Reserved TCP ports on `127.0.0.1`.
#[derive(Debug)]
pub(super) struct Ports {
    numbers: Vec<u16>,
    /// The UDP port of the same number is bound as a token: only one process can hold it, and it goes with the process.
    _tokens: Vec<UdpSocket>,
}

impl Ports {
    pub(super) fn reserve(count: usize) -> Result<Self> {
        let mut random = rand::rng();
        let free = (0..TRIES).filter_map(|_| {
            let port = random.random_range(RANGE);
            let token = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).ok()?;
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok().then_some((port, token))
        });
        let (numbers, tokens): (Vec<_>, Vec<_>) = free.take(count).unzip();
        if numbers.len() < count {
            return Err(Error::new(format!("no {count} free ports in {RANGE:?} on 127.0.0.1")));
        }
        Ok(Self { numbers, _tokens: tokens })
    }

    pub(super) fn numbers(&self) -> Vec<u16> {
        self.numbers.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_reserved_once_and_free_again_afterwards() {
        let ports = Ports::reserve(3).unwrap();
        let [first, ..] = ports.numbers()[..] else { panic!("no ports") };
        assert!(UdpSocket::bind((Ipv4Addr::LOCALHOST, first)).is_err());
        assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, first)).is_ok());
        drop(ports);
        assert!(UdpSocket::bind((Ipv4Addr::LOCALHOST, first)).is_ok());
    }
}
