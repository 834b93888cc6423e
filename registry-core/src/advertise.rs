//! The address to register, where a listener is bound to every address of its machine.
//!
//! A provider binds `0.0.0.0:0` and must register what others can call. [`endpoint`] and
//! [`InstanceBuilder::listening`](crate::InstanceBuilder::listening) choose, in this order:
//!
//! 1. The address that is named: by [`Advertise::address`], else by the environment variable `REGISTRY_ADVERTISE_ADDR`.
//! 2. The address that the listener is bound to, if it is a single one.
//! 3. An address of this machine, of the listener's family; `[::]` takes both families, except on Windows and OpenBSD.
//!    It is on the interface that is named ([`Advertise::interface`], else `REGISTRY_ADVERTISE_INTERFACE`), and in the
//!    network that is named ([`Advertise::network`], else `REGISTRY_ADVERTISE_NETWORK`).
//!
//! Of several addresses of this machine, the one from which it would call the internet comes first; then those of real
//! interfaces before those of containers, virtual machines and tunnels, IPv4 before IPv6, private before public, by the
//! index of the interface, and the smallest. Addresses of interfaces that are down do not count, nor do link-local
//! ones, which mean another machine on each link. Loopback comes last: that is a machine without a network. Whoever
//! registers it is warned.
//!
//! | variable | value |
//! | --- | --- |
//! | `REGISTRY_ADVERTISE_ADDR` | `host` or `host:port`: a name, or an address of any kind but unspecified, multicast and broadcast; the port is the listener's if it is not given |
//! | `REGISTRY_ADVERTISE_INTERFACE` | the name of an interface, such as `eth1` |
//! | `REGISTRY_ADVERTISE_NETWORK` | a network, such as `10.0.0.0/8` or `fd00::/8` |
//!
//! An empty variable is none.

use std::{
    env,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use crate::{Endpoint, Error, ErrorKind, Host, Instance, Result, location::parse_host};

const ADDRESS: &str = "REGISTRY_ADVERTISE_ADDR";
const INTERFACE: &str = "REGISTRY_ADVERTISE_INTERFACE";
const NETWORK: &str = "REGISTRY_ADVERTISE_NETWORK";

/// Whether a listener on `[::]` takes IPv4 as well, unless it was told otherwise.
const DUAL_STACK: bool = !cfg!(any(windows, target_os = "openbsd"));

/// Addresses that are reached by the default route, if there is one. Nothing is sent to them.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(1, 1, 1, 1)), IpAddr::V6(Ipv6Addr::new(0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1111))];

/// How the names of interfaces begin that lead to containers, virtual machines or through tunnels.
const VIRTUAL: &[&str] = &[
    "br-",
    "cali",
    "cilium",
    "cni",
    "docker",
    "dummy",
    "flannel",
    "kube",
    "lxc",
    "lxd",
    "nerdctl",
    "podman",
    "tailscale",
    "tap",
    "tun",
    "utun",
    "vboxnet",
    "vethernet",
    "veth",
    "virbr",
    "vmnet",
    "vnet",
    "wg",
    "zt",
];

/// The endpoint at which others can call a listener: its port, and the address that this [module](self) chooses.
///
/// # Errors
/// As for [`Advertise::endpoint`].
///
/// # Examples
/// ```
/// use registry_core::advertise;
///
/// let listener = std::net::TcpListener::bind("0.0.0.0:0")?;
/// let endpoint = advertise::endpoint("http", listener.local_addr()?)?;
/// assert_ne!(endpoint.host(), "0.0.0.0");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn endpoint(scheme: &str, bound: SocketAddr) -> Result<Endpoint> {
    Advertise::new().endpoint(scheme, bound)
}

/// [`endpoint`] with wishes of the program, each of which goes before its environment variable.
///
/// # Examples
/// ```
/// use registry_core::advertise::Advertise;
///
/// let bound = "0.0.0.0:8080".parse()?;
/// let endpoint = Advertise::new().address("orders-1.example.com:80").endpoint("http", bound)?;
/// assert_eq!(endpoint.to_string(), "http://orders-1.example.com:80");
///
/// let error = Advertise::new().address("0.0.0.0").endpoint("http", bound).unwrap_err();
/// assert!(error.to_string().contains("stands for every address of a machine"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Advertise {
    address: Option<String>,
    interface: Option<String>,
    network: Option<String>,
}

impl Advertise {
    /// No wishes: the environment and the machine decide.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names the address as `host` or `host:port`. Without a port, the listener's is taken.
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.address = Some(address.into());
        self
    }

    /// Takes only addresses of this interface.
    pub fn interface(mut self, interface: impl Into<String>) -> Self {
        self.interface = Some(interface.into());
        self
    }

    /// Takes only addresses in this network, such as `10.0.0.0/8`.
    pub fn network(mut self, network: impl Into<String>) -> Self {
        self.network = Some(network.into());
        self
    }

    /// The endpoint at which others can call a listener that is bound to `bound`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where the named address, interface or network is wrong, where the address is one
    /// that nobody can call, or where none is left to choose from, saying what to set. [`ErrorKind::Unsupported`] where
    /// the system does not tell its addresses.
    pub fn endpoint(&self, scheme: &str, bound: SocketAddr) -> Result<Endpoint> {
        let chosen = self.or_from(|variable| env::var(variable).ok()).choose(bound, Machine::look)?;
        Endpoint::new(scheme, &chosen.name, chosen.port.unwrap_or(bound.port()))
    }

    /// These wishes, and where there is none, that of the environment.
    fn or_from(&self, variable: impl Fn(&str) -> Option<String>) -> Self {
        let or =
            |wish: &Option<String>, name| wish.clone().or_else(|| variable(name).filter(|value| !value.is_empty()));
        Self {
            address: or(&self.address, ADDRESS),
            interface: or(&self.interface, INTERFACE),
            network: or(&self.network, NETWORK),
        }
    }

    fn choose(&self, bound: SocketAddr, look: impl FnOnce() -> Result<Machine>) -> Result<Host> {
        if let Some(address) = &self.address {
            return named(address);
        }
        let ip = bound.ip().to_canonical();
        let ip = if ip.is_unspecified() { self.detect(ip, &look()?)? } else { ip };
        if is_link_local(ip) {
            return Err(Error::invalid(format!(
                "cannot advertise {ip}, which the listener is bound to: it is link-local and means another machine on \
                 each link; set {ADDRESS}"
            )));
        }
        let name = ip.to_string();
        refuse_uncallable(&name)?;
        Ok(Host { name, port: None })
    }

    /// An address of this machine for a listener on all of them.
    fn detect(&self, any: IpAddr, machine: &Machine) -> Result<IpAddr> {
        let network = self.network.as_deref().map(Network::parse).transpose()?;
        let fits = |local: &&Local| {
            local.is_up
                && (any.is_ipv4() == local.ip.is_ipv4() || (any.is_ipv6() && machine.dual_stack))
                && !is_link_local(local.ip)
                && self.interface.as_ref().is_none_or(|interface| *interface == local.interface)
                && network.as_ref().is_none_or(|network| network.contains(local.ip))
        };
        let first = machine.locals.iter().filter(fits).min_by_key(|local| machine.rank(local));
        first.map(|local| local.ip).ok_or_else(|| self.nothing_fits(any, machine))
    }

    fn nothing_fits(&self, any: IpAddr, machine: &Machine) -> Error {
        let family = if any.is_ipv4() { "IPv4 address" } else { "address" };
        let on = self.interface.as_ref().map_or(String::new(), |interface| format!(" on the interface {interface:?}"));
        let within = self.network.as_ref().map_or(String::new(), |network| format!(" in the network {network}"));
        let there: Vec<_> = machine
            .locals
            .iter()
            .filter(|local| local.is_up && !is_link_local(local.ip))
            .map(|local| format!("{} ({})", local.ip, local.interface))
            .collect();
        Error::invalid(format!(
            "cannot choose an address to advertise: there is no {family}{on}{within} that is up and not link-local; this \
             machine has: {}; set {ADDRESS}, {INTERFACE} or {NETWORK}",
            there.join(", ")
        ))
    }
}

/// An address that someone named.
fn named(address: &str) -> Result<Host> {
    let host = match address.parse::<Ipv6Addr>() {
        Ok(_) => Host { name: address.to_owned(), port: None },
        Err(_) => parse_host(address)
            .map_err(|why| Error::invalid(format!("invalid address to advertise {address:?}: {why}; see {ADDRESS}")))?,
    };
    refuse_uncallable(&host.name)?;
    Ok(host)
}

fn refuse_uncallable(host: &str) -> Result<()> {
    match why_uncallable(host) {
        None => Ok(()),
        Some(why) => Err(Error::invalid(format!("cannot advertise {host}: {why}; set {ADDRESS} to one to call"))),
    }
}

/// Refuses an instance with an endpoint that nobody can call. Records of others may have one and are read all the same.
pub(crate) fn check(instance: &Instance) -> Result<()> {
    for endpoint in &instance.endpoints {
        if let Some(why) = why_uncallable(endpoint.host()) {
            return Err(Error::invalid(format!(
                "cannot register {}/{} at {endpoint}: {why}; name an address to call, or let `listening` choose it",
                instance.service, instance.id
            )));
        }
    }
    Ok(())
}

/// Says that an instance is registered where other machines cannot call it, if it `is_new`.
pub(crate) fn warn_of_loopback(instance: &Instance, is_new: impl FnOnce() -> bool) {
    let found = instance.endpoints.iter().find(|endpoint| is_loopback(endpoint.host()));
    if let Some(endpoint) = found.filter(|_| is_new()) {
        tracing::warn!(
            service = %instance.service, instance = %instance.id, %endpoint,
            "registered at a loopback address, which only this machine can call: bind the listener to 0.0.0.0 and \
             register its address with `listening`, or set {ADDRESS}"
        );
    }
}

/// Why nobody can call a host, if nobody can.
fn why_uncallable(host: &str) -> Option<&'static str> {
    match literal(host)? {
        ip if ip.is_unspecified() => Some("it stands for every address of a machine, and nobody can call it"),
        ip if ip.is_multicast() => Some("it is a multicast address"),
        IpAddr::V4(Ipv4Addr::BROADCAST) => Some("it is the broadcast address"),
        _ => None,
    }
}

fn is_loopback(host: &str) -> bool {
    literal(host).map_or(host.eq_ignore_ascii_case("localhost"), |ip| ip.is_loopback())
}

/// The address that a host is, without its zone, if it is no name.
fn literal(host: &str) -> Option<IpAddr> {
    let address = host.split_once('%').map_or(host, |(address, _)| address);
    address.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

/// The addresses of a machine, and which of them it calls others from.
#[derive(Clone, Debug)]
struct Machine {
    locals: Vec<Local>,
    routed: Vec<IpAddr>,
    dual_stack: bool,
}

/// One address of a machine.
#[derive(Clone, Debug)]
struct Local {
    ip: IpAddr,
    interface: String,
    index: u32,
    is_up: bool,
    is_point_to_point: bool,
}

impl Machine {
    /// This machine, now.
    fn look() -> Result<Self> {
        let listed = if_addrs::get_if_addrs().map_err(|error| {
            let message = format!("cannot list the addresses of this machine; set {ADDRESS}");
            Error::new(ErrorKind::Unsupported, message).with_source(error)
        })?;
        let locals = listed.into_iter().map(|listed| Local {
            ip: listed.ip(),
            index: listed.index.unwrap_or(u32::MAX),
            is_up: listed.is_oper_up(),
            is_point_to_point: listed.is_p2p(),
            interface: listed.name,
        });
        let routed = ELSEWHERE.into_iter().filter_map(|elsewhere| source_towards(elsewhere).ok());
        Ok(Self { locals: locals.collect(), routed: routed.collect(), dual_stack: DUAL_STACK })
    }

    /// The least is chosen.
    fn rank(&self, local: &Local) -> impl Ord + use<> {
        let ip = local.ip;
        let is_routed = self.routed.contains(&ip);
        (ip.is_loopback(), !is_routed, local.is_virtual(), ip.is_ipv6(), !is_private(ip), local.index, ip)
    }
}

impl Local {
    fn is_virtual(&self) -> bool {
        let name = self.interface.to_ascii_lowercase();
        self.is_point_to_point || VIRTUAL.iter().any(|prefix| name.starts_with(prefix))
    }
}

/// The address from which this machine calls another. To connect a UDP socket chooses it, and sends nothing.
fn source_towards(elsewhere: IpAddr) -> std::io::Result<IpAddr> {
    let any: IpAddr = if elsewhere.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((elsewhere, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// A network: the addresses that begin with the same bits.
#[derive(Debug, PartialEq, Eq)]
struct Network {
    base: IpAddr,
    bits: u32,
}

impl Network {
    fn parse(text: &str) -> Result<Self> {
        let parts = text.split_once('/').and_then(|(base, bits)| Some((base.parse().ok()?, bits.parse().ok()?)));
        parts
            .map(|(base, bits)| Self { base, bits })
            .filter(|network| network.bits <= if network.base.is_ipv4() { 32 } else { 128 })
            .ok_or_else(|| {
                Error::invalid(format!(
                    "invalid network {text:?} to advertise in: expected one such as 10.0.0.0/8 or fd00::/8; see {NETWORK}"
                ))
            })
    }

    fn contains(&self, ip: IpAddr) -> bool {
        match (self.base, ip) {
            (IpAddr::V4(base), IpAddr::V4(ip)) => (base.to_bits() ^ ip.to_bits()).leading_zeros() >= self.bits,
            (IpAddr::V6(base), IpAddr::V6(ip)) => (base.to_bits() ^ ip.to_bits()).leading_zeros() >= self.bits,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SERVER: &[(&str, &str)] = &[
        ("lo", "127.0.0.1"),
        ("lo", "::1"),
        ("eth0", "10.0.0.5"),
        ("eth0", "fe80::5"),
        ("eth0", "fd00::5"),
        ("docker0", "172.17.0.1"),
    ];
    const SEVERAL: &[(&str, &str)] = &[
        ("lo", "127.0.0.1"),
        ("docker0", "172.17.0.1"),
        ("tun0", "10.8.0.2"),
        ("eth0", "203.0.113.7"),
        ("eth1", "192.168.1.20"),
        ("eth1", "192.168.1.3"),
        ("eth2", "10.1.0.4"),
    ];
    const IPV6_ONLY: &[(&str, &str)] =
        &[("lo", "::1"), ("eth0", "fe80::5"), ("eth0", "2001:db8::5"), ("eth1", "fd00::7"), ("docker0", "fd00:d0c::1")];
    const OFFLINE: &[(&str, &str)] =
        &[("lo", "127.0.0.1"), ("lo", "::1"), ("eth0", "169.254.7.7"), ("eth0", "fe80::5")];

    /// Interfaces have their index by the order in which they come.
    fn machine(locals: &[(&str, &str)], routed: &[&str]) -> Machine {
        let mut names: Vec<&str> = Vec::new();
        let locals = locals.iter().map(|(name, ip)| {
            if !names.contains(name) {
                names.push(name);
            }
            Local {
                ip: ip.parse().unwrap(),
                interface: (*name).to_owned(),
                index: names.iter().position(|known| known == name).unwrap() as u32,
                is_up: true,
                is_point_to_point: false,
            }
        });
        let routed = routed.iter().map(|ip| ip.parse().unwrap()).collect();
        Machine { locals: locals.collect(), routed, dual_stack: true }
    }

    fn chosen(wishes: &Advertise, bound: &str, machine: &Machine) -> String {
        wishes.choose(bound.parse().unwrap(), || Ok(machine.clone())).unwrap().to_string()
    }

    fn refusal(wishes: &Advertise, bound: &str, machine: &Machine) -> String {
        let error = wishes.choose(bound.parse().unwrap(), || Ok(machine.clone())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        error.to_string()
    }

    #[test]
    fn of_a_machines_addresses_the_one_to_call_is_chosen() {
        for (bound, locals, routed, expected) in [
            ("0.0.0.0:80", SERVER, &["10.0.0.5"][..], "10.0.0.5"),
            ("[::]:80", SERVER, &["10.0.0.5", "fd00::5"], "10.0.0.5"),
            ("[::]:80", SERVER, &["fd00::5"], "[fd00::5]"),
            ("[::ffff:0.0.0.0]:80", SERVER, &["fd00::5"], "10.0.0.5"),
            ("0.0.0.0:80", SEVERAL, &["203.0.113.7"], "203.0.113.7"),
            ("0.0.0.0:80", SEVERAL, &["10.8.0.2"], "10.8.0.2"),
            // Without a default route: real before virtual, private before public, by index, the smallest.
            ("0.0.0.0:80", SEVERAL, &[], "192.168.1.3"),
            ("[::]:80", IPV6_ONLY, &["2001:db8::5"], "[2001:db8::5]"),
            ("[::]:80", IPV6_ONLY, &[], "[fd00::7]"),
            // What the route says is not ours: an address that went meanwhile.
            ("0.0.0.0:80", SERVER, &["10.9.9.9"], "10.0.0.5"),
            ("0.0.0.0:80", OFFLINE, &[], "127.0.0.1"),
            ("[::]:80", OFFLINE, &[], "127.0.0.1"),
        ] {
            assert_eq!(chosen(&Advertise::new(), bound, &machine(locals, routed)), expected, "{bound} {routed:?}");
            let mut backwards = machine(locals, routed);
            backwards.locals.reverse();
            assert_eq!(chosen(&Advertise::new(), bound, &backwards), expected, "whatever the order of the list");
        }
    }

    #[test]
    fn where_ipv6_listeners_take_no_ipv4_they_get_an_ipv6_address() {
        let mut machine = machine(SERVER, &["10.0.0.5"]);
        machine.dual_stack = false;
        assert_eq!(chosen(&Advertise::new(), "[::]:80", &machine), "[fd00::5]");
    }

    #[test]
    fn interfaces_that_are_down_or_lead_elsewhere_come_after_others() {
        let mut machine = machine(&[("eth0", "10.0.0.5"), ("ppp0", "10.1.0.5"), ("eth2", "10.2.0.5")], &[]);
        machine.locals[0].is_up = false;
        machine.locals[1].is_point_to_point = true;
        assert_eq!(chosen(&Advertise::new(), "0.0.0.0:80", &machine), "10.2.0.5");
    }

    #[test]
    fn a_single_address_that_is_bound_is_taken_and_the_machine_is_not_looked_at() {
        for (bound, expected) in [
            ("10.0.0.9:80", "10.0.0.9"),
            ("[2001:db8::9]:80", "[2001:db8::9]"),
            ("[::ffff:10.0.0.9]:80", "10.0.0.9"),
            ("127.0.0.1:80", "127.0.0.1"),
        ] {
            let chosen = Advertise::new().choose(bound.parse().unwrap(), || panic!("looked")).unwrap();
            assert_eq!(chosen.to_string(), expected);
        }
    }

    #[test]
    fn a_named_address_goes_before_everything() {
        let nowhere = machine(&[], &[]);
        for (address, expected) in [
            ("orders.example.com", "orders.example.com"),
            ("orders.example.com:8443", "orders.example.com:8443"),
            ("203.0.113.9", "203.0.113.9"),
            ("2001:db8::9", "[2001:db8::9]"),
            ("[2001:db8::9]:8443", "[2001:db8::9]:8443"),
            ("169.254.7.7", "169.254.7.7"),
            ("127.0.0.1", "127.0.0.1"),
        ] {
            let wishes = Advertise::new().address(address).interface("eth9");
            for bound in ["0.0.0.0:80", "10.0.0.9:80", "127.0.0.1:80"] {
                assert_eq!(chosen(&wishes, bound, &nowhere), expected);
            }
        }
    }

    #[test]
    fn an_interface_and_a_network_narrow_the_choice() {
        let machine = machine(SEVERAL, &["203.0.113.7"]);
        for (wishes, expected) in [
            (Advertise::new().interface("eth1"), "192.168.1.3"),
            (Advertise::new().interface("docker0"), "172.17.0.1"),
            (Advertise::new().interface("lo"), "127.0.0.1"),
            (Advertise::new().network("10.0.0.0/8"), "10.1.0.4"),
            (Advertise::new().network("192.168.1.20/32"), "192.168.1.20"),
            (Advertise::new().network("0.0.0.0/0"), "203.0.113.7"),
            (Advertise::new().network("10.0.0.0/8").interface("tun0"), "10.8.0.2"),
        ] {
            assert_eq!(chosen(&wishes, "0.0.0.0:80", &machine), expected, "{wishes:?}");
        }
        assert_eq!(chosen(&Advertise::new().network("fd00::/8"), "[::]:80", &self::machine(SERVER, &[])), "[fd00::5]");
    }

    #[test]
    fn wishes_of_the_program_go_before_the_environment() {
        let environment = |name: &str| match name {
            ADDRESS => Some(String::new()),
            INTERFACE => Some("eth1".to_owned()),
            NETWORK => Some("10.0.0.0/8".to_owned()),
            _ => panic!("asked for {name}"),
        };
        let wishes = Advertise::new().interface("eth2").or_from(environment);
        assert_eq!(wishes, Advertise::new().interface("eth2").network("10.0.0.0/8"), "an empty variable is none");
        let named = Advertise::new().interface("eth2").or_from(|name| (name == ADDRESS).then(|| "a:1".to_owned()));
        assert_eq!(chosen(&named, "0.0.0.0:80", &machine(SEVERAL, &[])), "a:1");
    }

    #[test]
    fn what_is_wrong_is_said_with_what_to_set() {
        let several = machine(SEVERAL, &[]);
        for (wishes, bound, why) in [
            (Advertise::new().address("0.0.0.0"), "10.0.0.5:80", "0.0.0.0: it stands for every address"),
            (Advertise::new().address("[::]:80"), "10.0.0.5:80", "::: it stands for every address"),
            (Advertise::new().address("224.0.0.1"), "10.0.0.5:80", "multicast"),
            (Advertise::new().address("255.255.255.255"), "10.0.0.5:80", "broadcast"),
            (Advertise::new().address("a b"), "10.0.0.5:80", "\"a b\": expected a host name"),
            (Advertise::new().address("a:0"), "10.0.0.5:80", "1 to 65535"),
            (Advertise::new(), "169.254.7.7:80", "169.254.7.7, which the listener is bound to: it is link-local"),
            (Advertise::new(), "[fe80::5]:80", "link-local"),
            (Advertise::new(), "[ff02::1]:80", "multicast"),
            (Advertise::new().interface("eth9"), "0.0.0.0:80", "on the interface \"eth9\""),
            (Advertise::new().interface("eth0").network("10.0.0.0/8"), "0.0.0.0:80", "in the network 10.0.0.0/8"),
            (Advertise::new().network("10.0.0.0"), "0.0.0.0:80", "such as 10.0.0.0/8"),
            (Advertise::new().network("10.0.0.0/33"), "0.0.0.0:80", "such as 10.0.0.0/8"),
        ] {
            let refusal = refusal(&wishes, bound, &several);
            assert!(refusal.contains(why) && refusal.contains("REGISTRY_ADVERTISE_"), "{wishes:?}: {refusal}");
        }
        let refusal = refusal(&Advertise::new().interface("eth0"), "0.0.0.0:80", &machine(OFFLINE, &[]));
        assert!(refusal.contains("this machine has: 127.0.0.1 (lo), ::1 (lo);"), "{refusal}");
    }

    #[test]
    fn a_machine_that_does_not_tell_its_addresses_needs_one_named() {
        let silent = || Err(Error::new(ErrorKind::Unsupported, "silent"));
        let bound = "0.0.0.0:80".parse().unwrap();
        assert_eq!(Advertise::new().choose(bound, silent).unwrap_err().kind(), ErrorKind::Unsupported);
        Advertise::new().address("10.0.0.5").choose(bound, silent).unwrap();
    }

    #[test]
    fn hosts_that_nobody_can_call_are_recognised_however_they_are_spelled() {
        for host in
            ["0.0.0.0", "::", "0:0::0", "::ffff:0.0.0.0", "::%eth0", "239.1.1.1", "ff02::1%2", "255.255.255.255"]
        {
            assert!(why_uncallable(host).is_some(), "{host}");
        }
        for host in ["10.0.0.5", "fe80::1%eth0", "127.0.0.1", "192.0.2.1", "::1", "localhost", "0.example.com"] {
            assert_eq!(why_uncallable(host), None, "{host}");
        }
        for (host, here) in
            [("127.8.8.8", true), ("::1", true), ("LocalHost", true), ("::ffff:127.0.0.1", true), ("local", false)]
        {
            assert_eq!(is_loopback(host), here, "{host}");
        }
    }

    #[test]
    fn this_machine_has_an_address() {
        let machine = Machine::look().unwrap();
        assert!(machine.locals.iter().any(|local| local.ip.is_loopback() && local.is_up), "{machine:?}");
        endpoint("http", "127.0.0.1:80".parse().unwrap()).unwrap();
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_a_network_or_refused(any in any::<String>(), near in "[0-9a-f:.%/\\[\\]]{0,40}") {
            for text in [any, near] {
                if let Ok(host) = named(&text) {
                    prop_assert!(Endpoint::new("http", &host.name, 80).is_ok(), "{:?}", host);
                }
                let _ = Network::parse(&text).map(|network| network.contains(network.base));
            }
        }
    }
}
