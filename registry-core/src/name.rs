//! Names, parsed at the edge: inner code cannot hold a bad one, and one reversible encoding serves every store.

use std::{
    borrow::{Borrow, Cow},
    fmt,
    ops::Deref,
    sync::Arc,
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, Result};

/// The longest name, in bytes of UTF-8.
pub const MAX_NAME_BYTES: usize = 255;

/// What stays as it is in a path segment. `~` does not, so it is free for the library's own nodes.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// Spells `name` as one path segment, reversibly and alike for every store.
///
/// Letters, digits, `-`, `_` and `.` stay; everything else is percent-encoded, so a name that holds a `/` is still
/// one segment. The names `.` and `..` are encoded too.
///
/// # Examples
/// ```
/// use registry_core::{decode_segment, encode_segment};
///
/// assert_eq!(encode_segment("UserServiceRpc/Login"), "UserServiceRpc%2FLogin");
/// assert_eq!(encode_segment(".."), "%2E%2E");
/// assert_eq!(decode_segment("UserServiceRpc%2FLogin").as_deref(), Some("UserServiceRpc/Login"));
/// ```
#[must_use]
pub fn encode_segment(name: &str) -> Cow<'_, str> {
    if matches!(name, "." | "..") { name.replace('.', "%2E").into() } else { utf8_percent_encode(name, SEGMENT).into() }
}

/// The name that `segment` spells, or `None` if [`encode_segment`] never writes that segment.
#[must_use]
pub fn decode_segment(segment: &str) -> Option<Cow<'_, str>> {
    let stays = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if segment.bytes().all(stays) && !matches!(segment, "." | "..") {
        return Some(segment.into());
    }
    let name = percent_decode_str(segment).decode_utf8().ok()?;
    (encode_segment(&name) == segment).then_some(name)
}

pub(crate) fn check(what: &str, name: &str) -> Result<()> {
    // Nearly all are plain.
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Ok(());
    }
    let reason = if name.is_empty() {
        "it is empty".to_owned()
    } else if name.len() > MAX_NAME_BYTES {
        format!("it has {} bytes, at most {MAX_NAME_BYTES} are allowed", name.len())
    } else if let Some(c) = name.chars().find(|c| c.is_control()) {
        format!("the control character {c:?} is not allowed")
    } else {
        return Ok(());
    };
    let shown: String = name.chars().take(40).collect();
    let more = if shown.len() < name.len() { "…" } else { "" };
    Err(Error::invalid(format!("invalid {what} \"{}{more}\": {reason}", shown.escape_debug())))
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks and takes a name: non-empty UTF-8 of at most 255 bytes without control characters.
            ///
            /// # Errors
            /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput), saying which of these does not hold.
            pub fn parse(name: impl AsRef<str>) -> Result<Self> {
                let name = name.as_ref();
                check($what, name)?;
                Ok(Self(name.into()))
            }

            /// The name as it was given.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Deref for $type {
            type Target = str;
            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl TryFrom<&str> for $type {
            type Error = Error;
            fn try_from(name: &str) -> Result<Self> {
                Self::parse(name)
            }
        }

        impl std::str::FromStr for $type {
            type Err = Error;
            fn from_str(name: &str) -> Result<Self> {
                Self::parse(name)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::parse(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

name! {
    /// The name of a service: the group that instances register under and readers ask for.
    ///
    /// # Examples
    /// ```
    /// use registry_core::ServiceName;
    ///
    /// let name = ServiceName::parse("UserServiceRpc/Login")?;
    /// assert_eq!(name.as_str(), "UserServiceRpc/Login");
    /// assert!(ServiceName::parse("tab\tseparated").is_err());
    /// # Ok::<(), registry_core::Error>(())
    /// ```
    ServiceName, "service name"
}

name! {
    /// The id of one instance, unique within its service.
    InstanceId, "instance id"
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_at_the_limits() {
        assert!(ServiceName::parse("x".repeat(255)).is_ok());
        let long = ServiceName::parse("ä".repeat(128)).unwrap_err().to_string();
        assert!(long.contains("256 bytes, at most 255"), "{long}");
        assert!(InstanceId::parse("a\0b").unwrap_err().to_string().contains("control character '\\0'"));
    }

    #[test]
    fn hostile_segments_stay_one_segment() {
        for (name, segment) in [
            ("a/b", "a%2Fb"),
            (".", "%2E"),
            ("..", "%2E%2E"),
            ("a.b", "a.b"),
            ("~left~", "%7Eleft%7E"),
            ("%2F", "%252F"),
            ("ä", "%C3%A4"),
        ] {
            assert_eq!(encode_segment(name), segment);
            assert_eq!(decode_segment(segment).as_deref(), Some(name));
        }
    }

    #[test]
    fn segments_that_we_never_write_are_refused() {
        for segment in ["%2f", "a~b", "%FF", "%", "..", "%41"] {
            assert_eq!(decode_segment(segment), None, "{segment}");
        }
    }

    proptest! {
        #[test]
        fn every_name_round_trips_through_its_segment(name in "\\PC{1,60}") {
            let segment = encode_segment(&name);
            prop_assert!(!segment.contains('/') && segment != "." && segment != "..");
            prop_assert_eq!(decode_segment(&segment), Some(name.as_str().into()));
        }

        #[test]
        fn decoding_takes_any_text(text in any::<String>()) {
            if let Some(name) = decode_segment(&text) {
                prop_assert_eq!(encode_segment(&name), text.as_str());
            }
        }
    }
}
