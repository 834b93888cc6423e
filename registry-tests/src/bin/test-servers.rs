//! Starts servers, runs a command that finds their addresses in its environment, and stops them when it ends:
//!
//! ```text
//! test-servers etcd -- cargo nextest run --features etcd
//! ```
//!
//! One server for a whole test run, instead of one for each of its processes. Ends with the status of the command.

use std::{ffi::OsString, process::ExitCode};

use registry_tests::servers;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let stores: Vec<_> =
        args.by_ref().take_while(|arg| arg != "--").map(|arg| arg.to_string_lossy().into_owned()).collect();
    let command: Vec<OsString> = args.collect();
    if stores.is_empty() || command.is_empty() {
        eprintln!("usage: test-servers STORE… -- COMMAND [ARGUMENT…]");
        return ExitCode::from(2);
    }
    match servers::run_with_shared(&stores, &command).await {
        // A command that was ended by a signal has no code.
        Ok(status) => status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from),
        Err(error) => {
            eprintln!("test-servers: {error}");
            ExitCode::FAILURE
        }
    }
}
