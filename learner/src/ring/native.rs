//! The only unsafe code of the learner: CUDA registration and signals for child processes.
#![expect(unsafe_code, reason = "dlopen and prctl are C calls")]

use std::{os::unix::process::CommandExt, process::Command};

/// Loads `libtorch_cuda.so` and returns whether the library was found. Its static initializers register the CUDA kernels, so that one
/// binary serves hosts with and without a GPU. Must be called before the first query for CUDA.
pub fn register_cuda() -> bool {
    // SAFETY: the name is a C string; the library is libtorch's own and its initializers are made to run at load
    let handle = unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    !handle.is_null()
}

/// Makes a child receive SIGTERM when this process ends, for whatever reason.
pub fn die_with_parent(command: &mut Command) {
    let hook = || {
        // SAFETY: prctl with these constants takes no pointer and is safe between fork and exec
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    // SAFETY: the hook only makes one async-signal-safe call
    unsafe { command.pre_exec(hook) };
}

/// Sends SIGTERM to a process.
pub fn terminate(pid: u32) {
    // SAFETY: kill takes no pointer; the pid is of a child that has not been waited for, so it is not reused
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
}
