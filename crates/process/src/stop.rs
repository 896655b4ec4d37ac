//! Stop of a process on SIGTERM or ctrl-c: requested first, then forced.

use std::{io, sync::mpsc, thread, time::Duration};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
    low_level,
};

/// Time that a process has to end by itself; afterwards a stuck process is ended.
pub const GRACE: Duration = Duration::from_secs(9);

/// Calls `stop` at the first SIGTERM or ctrl-c. A process that still runs [`GRACE`] later, or at a second signal, is ended with
/// status 1. Dedicated threads handle signals, so that no stuck runtime, thread or native call can prevent the end.
///
/// # Errors
/// The signal handler or a thread cannot be created.
pub fn on_signal(stop: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let (sender, arrived) = mpsc::channel();
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for _signal in signals.forever() {
            if sender.send(()).is_err() {
                return;
            }
        }
    })?;
    thread::Builder::new().name("stop".to_owned()).spawn(move || {
        if arrived.recv().is_err() {
            return;
        }
        tracing::info!("stopping");
        stop();
        match arrived.recv_timeout(GRACE) {
            Ok(()) => tracing::warn!("stopped at the second signal"),
            Err(_late) => tracing::error!("did not stop within {GRACE:?} and is ended"),
        }
        // without destructors: a destructor may hang
        low_level::exit(1);
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        process::{Child, Command, Stdio},
    };

    use super::*;

    /// Environment variable that is set in the process of the stuck program.
    const STUCK: &str = "PIRL_TEST_STUCK";

    /// Runs as a program that handles signals and never ends by itself when [`STUCK`] is set; does nothing otherwise.
    #[test]
    #[expect(clippy::infinite_loop, reason = "it is what a stuck program does")]
    fn stuck_program() {
        if std::env::var_os(STUCK).is_none() {
            return;
        }
        on_signal(|| {}).expect("a handler");
        println!("ready");
        loop {
            thread::park();
        }
    }

    fn stuck() -> Child {
        let own = std::env::current_exe().expect("own path");
        let mut child = Command::new(own)
            .args(["--exact", "stop::tests::stuck_program", "--nocapture"])
            .env(STUCK, "1")
            .stdout(Stdio::piped())
            .spawn()
            .expect("starting this test again");
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        let ready = out.lines().map_while(Result::ok).any(|line| line.contains("ready"));
        assert!(ready, "the program did not start");
        child
    }

    fn terminate(child: &Child) {
        let sent = Command::new("sh")
            .arg("-c")
            .arg(format!("kill -TERM {}", child.id()))
            .status();
        assert!(sent.expect("starting `sh`").success());
    }

    #[test]
    fn a_stuck_process_is_ended_after_its_grace() {
        let mut child = stuck();
        terminate(&child);
        assert_eq!(child.wait().expect("its end").code(), Some(1));
    }

    #[test]
    fn a_second_signal_ends_it_at_once() {
        let mut child = stuck();
        let begun = std::time::Instant::now();
        // the first one may not have been counted when the second comes: signals of one kind are merged
        while child.try_wait().expect("its state").is_none() {
            terminate(&child);
        }
        assert_eq!(child.wait().expect("its end").code(), Some(1));
        assert!(begun.elapsed() < GRACE, "it did not wait for the grace");
    }
}
