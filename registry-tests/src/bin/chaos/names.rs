//! What is registered: every provider has a few instances, spread over the services, for the whole run.

use std::fmt;

use registry_core::{Instance, Key};

pub(crate) const SERVICES: [&str; 2] = ["orders", "payments"];
pub(crate) const PROVIDERS: usize = 6;
pub(crate) const READERS: usize = 3;
/// How many instances a provider has, of all services.
pub(crate) const INSTANCES: usize = 4;

/// The field of an instance's metadata that tells one content of it from another.
pub(crate) const GENERATION: &str = "generation";

/// Which content of an instance it is. Grows with every `register`, whoever registers.
pub(crate) type Generation = u64;

/// An instance: so many of a provider's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name {
    pub(crate) provider: usize,
    pub(crate) number: usize,
}

impl Name {
    /// All there are.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..PROVIDERS).flat_map(|provider| (0..INSTANCES).map(move |number| Self { provider, number }))
    }

    pub(crate) fn service(self) -> &'static str {
        SERVICES[self.number % SERVICES.len()]
    }

    pub(crate) fn id(self) -> String {
        self.to_string()
    }

    /// The one of these names.
    pub(crate) fn find(service: &str, id: &str) -> Option<Self> {
        let (provider, number) = id.strip_prefix('p')?.split_once('-')?;
        let name = Self { provider: provider.parse().ok()?, number: number.parse().ok()? };
        let known = name.provider < PROVIDERS && name.number < INSTANCES;
        (known && name.service() == service && name.id() == id).then_some(name)
    }

    pub(crate) fn key(self) -> Key {
        Key::provider(self.service().parse().expect("a service name"), self.id().parse().expect("an id"))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}-{}", self.provider, self.number)
    }
}

/// The generation that an instance says it is.
pub(crate) fn generation(instance: &Instance) -> Option<Generation> {
    instance.metadata.get(GENERATION)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_by_what_it_is_registered_as() {
        assert!(Name::all().all(|name| Name::find(name.service(), &name.id()) == Some(name)));
        assert_eq!(Name::all().count(), PROVIDERS * INSTANCES);
        for (service, id) in [("orders", "p0-1"), ("orders", "p00-0"), ("orders", "p9-0"), ("payments", "x")] {
            assert_eq!(Name::find(service, id), None, "{service} {id}");
        }
    }
}
