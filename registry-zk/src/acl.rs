//! Who may do what with the nodes that we make, as an operator spells it.

use std::{fmt, str::FromStr};

use registry_core::{Error, Result};
use serde::Deserialize;
use zookeeper_client::{Acl, Acls, AuthId, Permission};

/// What is accepted, for errors.
const ACCEPTED: &str = "open, creator-all, or a list of scheme:id:perms with perms out of cdrwa";

/// Who may do what with the nodes that this registry makes.
///
/// Nodes that exist keep the access control lists that they have, as does the root, once it is made.
///
/// # Examples
/// ```
/// use registry_zk::ZooKeeperAcl;
///
/// let acl: ZooKeeperAcl = "sasl:app:cdrwa,world:anyone:r".parse()?;
/// assert_eq!(acl, ZooKeeperAcl::Explicit(vec!["sasl:app:cdrwa".into(), "world:anyone:r".into()]));
/// assert_eq!("creator-all".parse::<ZooKeeperAcl>()?, ZooKeeperAcl::CreatorAll);
/// assert!("sasl:app:everything".parse::<ZooKeeperAcl>().is_err());
/// # Ok::<(), registry_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ZooKeeperAcl {
    /// Everyone may do everything.
    #[default]
    Open,
    /// Whoever has our identity may do everything, nobody else anything. Needs a user or a client certificate.
    CreatorAll,
    /// Exactly these, each as `scheme:id:perms`, as ZooKeeper's own command line spells them: `sasl:app:cdrwa`,
    /// `world:anyone:r`. Whoever registers needs `cdrwa`, whoever reads `r`.
    Explicit(Vec<String>),
}

impl FromStr for ZooKeeperAcl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "open" => return Ok(Self::Open),
            "creator-all" => return Ok(Self::CreatorAll),
            _ => {}
        }
        // An id may hold a comma, as the name in a certificate does: an entry ends where its permissions do.
        let (mut entries, mut entry) = (Vec::new(), String::new());
        for part in text.split(',') {
            if !entry.is_empty() {
                entry.push(',');
            } else if part.is_empty() {
                return Err(bad(text));
            }
            entry.push_str(part);
            if parse(&entry).is_some() {
                entries.push(std::mem::take(&mut entry));
            }
        }
        if !entry.is_empty() {
            return Err(bad(text));
        }
        Ok(Self::Explicit(entries))
    }
}

impl ZooKeeperAcl {
    /// The same in the client's words.
    pub(crate) fn to_list(&self) -> Result<AclList> {
        Ok(AclList(match self {
            Self::Open => Acls::anyone_all().to_vec(),
            Self::CreatorAll => Acls::creator_all().to_vec(),
            Self::Explicit(entries) if entries.is_empty() => return Err(bad("")),
            Self::Explicit(entries) => {
                entries.iter().map(|entry| parse(entry).ok_or_else(|| bad(entry))).collect::<Result<_>>()?
            }
        }))
    }
}

/// A checked list, ready to use.
#[derive(Clone)]
pub(crate) struct AclList(Vec<Acl>);

impl AclList {
    pub(crate) fn acls(&self) -> Acls<'_> {
        Acls::new(&self.0)
    }

    /// About how many bytes it takes in a request.
    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().map(|acl| 12 + acl.scheme().len() + acl.id().len()).sum()
    }
}

impl fmt::Debug for AclList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AclList({})", self.0.len())
    }
}

/// One entry. An id may hold colons, as that of a digest does.
fn parse(entry: &str) -> Option<Acl> {
    let (scheme, rest) = entry.split_once(':')?;
    let (id, permissions) = rest.rsplit_once(':')?;
    if scheme.is_empty() || permissions.is_empty() {
        return None;
    }
    let mut all = Permission::NONE;
    for permission in permissions.chars() {
        all = all
            | match permission {
                'c' => Permission::CREATE,
                'd' => Permission::DELETE,
                'r' => Permission::READ,
                'w' => Permission::WRITE,
                'a' => Permission::ADMIN,
                _ => return None,
            };
    }
    Some(Acl::new(all, AuthId::new(scheme, id)))
}

fn bad(acl: &str) -> Error {
    Error::invalid(format!("invalid acl {acl:?}: expected {ACCEPTED}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explicit(text: &str) -> Vec<String> {
        match text.parse().unwrap() {
            ZooKeeperAcl::Explicit(entries) => entries,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn entries_are_spelled_as_on_zookeepers_command_line() {
        let acl = parse("digest:app:nBb8kYpvA5nBgtXUvjS/b4zGV6Y=:crw").unwrap();
        assert_eq!((acl.scheme(), acl.id()), ("digest", "app:nBb8kYpvA5nBgtXUvjS/b4zGV6Y="));
        assert!(acl.permission().has(Permission::CREATE | Permission::READ | Permission::WRITE));
        assert!(!acl.permission().has(Permission::DELETE) && !acl.permission().has(Permission::ADMIN));
        assert_eq!(parse("auth::cdrwa").unwrap().permission(), Permission::ALL);
    }

    #[test]
    fn a_comma_within_an_id_ends_no_entry() {
        assert_eq!(
            explicit("x509:CN=app,O=example:cdrwa,world:anyone:r"),
            ["x509:CN=app,O=example:cdrwa", "world:anyone:r"]
        );
    }

    #[test]
    fn what_is_no_acl_is_refused_with_what_is_expected() {
        for bad in [
            "",
            ",",
            "all",
            "world:anyone",
            "world:anyone:x",
            "world:anyone:",
            ":a:r",
            "world:anyone:r,",
            "OPEN",
            ",world:anyone:r",
            "world:anyone:r,,sasl:app:r",
        ] {
            let error = bad.parse::<ZooKeeperAcl>().expect_err(bad).to_string();
            assert!(error.contains("creator-all"), "{error}");
        }
        assert!(ZooKeeperAcl::Explicit(Vec::new()).to_list().is_err());
        assert!(ZooKeeperAcl::Explicit(vec!["world".into()]).to_list().is_err());
    }
}
