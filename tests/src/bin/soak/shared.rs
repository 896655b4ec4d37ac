//! Shared parts of the soak's commands: attacked programs, folder, plan, lines of output, end of a process.

use std::{
    io::{Read, Write},
    path::Path,
    thread,
};

use clap::Args;
use integration_tests::{
    ring,
    siege::GRACE,
    standalone::{Programs, Server},
};
use policy::plan::RunPlan;
use tempfile::TempDir;

/// The attacked programs.
#[derive(Debug, Args)]
pub(crate) struct Attacked {
    /// Folder of rollout-engine, learner, export and env-worker; default: `PIRL_PROGRAMS`, otherwise this program's folder.
    #[arg(long, value_name = "DIR")]
    programs: Option<String>,
    /// Address space of an attacked process in GiB (`ulimit -v`); default: no limit.
    #[arg(long, value_name = "GIB")]
    address_space_gib: Option<u64>,
}

impl Attacked {
    pub(crate) fn programs(&self) -> Programs {
        Programs::new(self.programs.as_deref())
    }

    /// Returns the limit of the address space in bytes.
    pub(crate) fn address_space(&self) -> Option<u64> {
        self.address_space_gib.map(|gib| gib << 30)
    }
}

/// Writes a line to standard output.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").expect("writing to standard output");
    out.flush().expect("writing to standard output");
}

/// Makes a folder that is removed when the value is dropped.
pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir().expect("creating a folder for the soak")
}

/// Returns the plan of the tabletop, with its output in `dir`.
pub(crate) fn plan(dir: &Path) -> RunPlan {
    ring::plan(dir, &[])
}

/// Ends this process when its parent closes its standard input, so that no attacker outlives the soak.
pub(crate) fn end_with_parent() {
    thread::spawn(|| {
        drop(std::io::stdin().read_to_end(&mut Vec::new()));
        #[expect(
            clippy::exit,
            reason = "the attack runs in other threads, which have nothing to save"
        )]
        std::process::exit(3);
    });
}

/// Sends SIGTERM to a server, prints the result and returns whether the server ended in time.
pub(crate) fn finish(server: &mut Server) -> bool {
    if let Some(status) = server.ended() {
        say(&format!(
            "  the process ended before SIGTERM: {status}; its log: {}",
            server.log_tail()
        ));
        return false;
    }
    if let Some(time) = server.terminate(GRACE) {
        say(&format!("  SIGTERM: ended after {:.2} s", time.as_secs_f64()));
        true
    } else {
        say(&format!(
            "  FAILED: not ended {} s after SIGTERM, killed",
            GRACE.as_secs()
        ));
        false
    }
}
