//! The end of a process on SIGTERM or ctrl-c: asked for once, then forced.

use std::{io, sync::mpsc, thread, time::Duration};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
    low_level,
};

/// Time that a process has to end by itself; a stuck one is ended then.
pub const GRACE: Duration = Duration::from_secs(9);

/// Calls `stop` at the first SIGTERM or ctrl-c. A process that is still there [`GRACE`] later, or at a second signal, is ended with
/// status 1. Threads of their own do this, so that no stuck runtime, thread or native call can keep the process.
///
/// # Errors
/// The system gives no handler or no thread.
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
        // without destructors: one of them may be what hangs
        low_level::exit(1);
    })?;
    Ok(())
}
