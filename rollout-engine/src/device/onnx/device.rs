//! [`Device`] and [`Loader`] over the sessions of each version.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use policy::{bundle::Bundle, config::Flavour};

use super::{
    runtime::OnnxRuntime,
    sessions::{PolicySessions, PrefixCache, PrefixSession},
};
use crate::device::{
    Device, DeviceError, Loader, PrefixBatch, SelfTestRun, Slot, StepOutput, StepPath, library::provider_name,
};

/// A loaded version whose self-test has run.
#[derive(Debug)]
pub struct Staged {
    sessions: PolicySessions,
    test: Vec<StepOutput>,
}

/// Loader of sessions. Versions with the same vision-language weights and the same prefix graph share one prefix session.
#[derive(Debug)]
pub struct OnnxLoader {
    runtime: OnnxRuntime,
    /// The prefix session of the latest loaded version, while a version uses the session.
    shared: Mutex<Weak<PrefixSession>>,
}

impl OnnxLoader {
    /// Creates a loader.
    pub fn new(runtime: OnnxRuntime) -> Self {
        Self {
            runtime,
            shared: Mutex::new(Weak::new()),
        }
    }
}

impl Loader for OnnxLoader {
    type Device = OnnxDevice;

    fn stage(&self, bundle: &Bundle, test: &SelfTestRun) -> Result<Staged, DeviceError> {
        if bundle.manifest.flavour != Flavour::Plain {
            return Err(DeviceError::flavour(
                provider_name(self.runtime.provider()),
                Flavour::Plain,
            ));
        }
        // one load at a time; the device's thread never acquires this lock
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let earlier = shared.upgrade().filter(|prefix| prefix.is_of(bundle));
        let prefix = match earlier {
            Some(prefix) => prefix,
            None => Arc::new(PrefixSession::load(&self.runtime, bundle)?),
        };
        let cache = prefix.self_test(&self.runtime, bundle, &test.prefix)?;
        let mut sessions = PolicySessions::load(&self.runtime, bundle, Arc::clone(&prefix))?;
        let test = sessions.denoise(&cache, &test.path)?;
        *shared = Arc::downgrade(&prefix);
        Ok(Staged { sessions, test })
    }
}

/// Sessions of the versions in use, by slot.
#[derive(Debug, Default)]
pub struct OnnxDevice {
    slots: BTreeMap<Slot, PolicySessions>,
    last: u64,
}

impl OnnxDevice {
    fn slot(&mut self, slot: Slot) -> Result<&mut PolicySessions, DeviceError> {
        self.slots.get_mut(&slot).ok_or(DeviceError::Slot(slot.0))
    }
}

impl Device for OnnxDevice {
    type Staged = Staged;
    type Prefix = Arc<PrefixCache>;

    fn install(
        &mut self,
        staged: Staged,
        _run_when_staged: &SelfTestRun,
    ) -> Result<(Slot, Vec<StepOutput>), DeviceError> {
        self.last += 1;
        let slot = Slot(self.last);
        self.slots.insert(slot, staged.sessions);
        Ok((slot, staged.test))
    }

    fn prefix(&mut self, slot: Slot, batch: PrefixBatch) -> Result<Arc<PrefixCache>, DeviceError> {
        self.slot(slot)?.prefix(batch)
    }

    fn denoise(
        &mut self,
        slot: Slot,
        prefix: &Arc<PrefixCache>,
        path: &StepPath,
    ) -> Result<Vec<StepOutput>, DeviceError> {
        self.slot(slot)?.denoise(prefix, path)
    }

    fn free(&mut self, slot: Slot) {
        self.slots.remove(&slot);
    }
}
