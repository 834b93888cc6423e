//! The scripts: each change of a service is one of them, so that its records and its log move together.

use std::{borrow::Cow, sync::LazyLock};

use redis::{Cmd, Script as Digest};

/// A script, known to servers by the digest of its text.
#[derive(Debug)]
pub(crate) struct Script {
    text: String,
    digest: String,
}

macro_rules! script {
    ($(#[$doc:meta])* $name:ident, $($file:literal),+) => {
        $(#[$doc])*
        pub(crate) static $name: LazyLock<Script> =
            LazyLock::new(|| Script::new(concat!($(include_str!(concat!("scripts/", $file)), "\n"),+)));
    };
}

script!(
    /// Writes records.
    PUT, "prelude.lua", "put.lua"
);
script!(
    /// Keeps records alive, or looks which of them live.
    RENEW, "prelude.lua", "upkeep.lua", "renew.lua"
);
script!(
    /// Takes records out.
    REMOVE, "prelude.lua", "upkeep.lua", "remove.lua"
);
script!(
    /// Judges who is alive, and takes out who is not.
    LOOK, "prelude.lua", "upkeep.lua", "look.lua"
);
script!(
    /// Which of many services have changed.
    CHANGED, "changed.lua"
);
script!(
    /// Keeps names in the index of services.
    INDEX, "index.lua"
);

impl Script {
    fn new(text: &str) -> Self {
        Self { text: text.to_owned(), digest: Digest::new(text).get_hash().to_owned() }
    }

    /// The call of this script: by its digest, or `whole` where the server does not know it yet.
    pub(crate) fn call(&self, whole: bool, keys: &[Cow<'_, str>], args: &[Cow<'_, [u8]>]) -> Cmd {
        let (verb, text) = if whole { ("EVAL", &self.text) } else { ("EVALSHA", &self.digest) };
        let words = || keys.iter().map(|key| key.as_bytes()).chain(args.iter().map(AsRef::as_ref));
        let bytes = verb.len() + text.len() + words().map(<[u8]>::len).sum::<usize>();
        // And the number of keys.
        let mut cmd = Cmd::with_capacity(3 + words().count(), bytes + 2);
        cmd.arg(verb).arg(text).arg(keys.len());
        for word in words() {
            cmd.arg::<&[u8]>(word);
        }
        cmd
    }
}
