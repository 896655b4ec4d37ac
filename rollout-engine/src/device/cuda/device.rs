//! [`Device`] and [`Loader`] on the memory of a CUDA device.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use policy::{
    bundle::{Bundle, EXPERT_WEIGHTS, MANIFEST},
    config::Flavour,
    cuda::CudaContract,
};

use super::{
    graphs::CudaOptions,
    model::{Encoded, Model, WeightSlot, WeightSlots},
    runtime::{Runtime, Stream},
    weights::Upload,
};
use crate::device::{
    Device, DeviceError, Loader, PrefixBatch, SelfTestRun, Slot, StepOutput, StepPath, library::OnnxLibrary,
};

/// Digests of the files that versions share: all except the expert's weights and the manifest.
type Identity = Vec<(String, String)>;

fn identity(bundle: &Bundle) -> Identity {
    let own = [EXPERT_WEIGHTS, MANIFEST];
    let shared = bundle
        .manifest
        .files
        .iter()
        .filter(|file| !own.contains(&file.name.as_str()));
    shared.map(|file| (file.name.clone(), file.sha256.clone())).collect()
}

/// A version whose weights are on the device.
#[derive(Debug)]
pub struct Staged {
    /// The policy, for the first version of these graphs and vision-language weights.
    model: Option<Box<Model>>,
    weight_slot: WeightSlot,
    slots: Arc<WeightSlots>,
}

/// What a load needs; one load at a time.
struct Loading {
    upload: Upload,
    /// Weight slots of the policies that versions use.
    known: Vec<(Identity, CudaContract, Weak<WeightSlots>)>,
}

/// Loader of policies onto the device.
pub struct CudaLoader {
    library: OnnxLibrary,
    runtime: Arc<Runtime>,
    options: CudaOptions,
    loading: Mutex<Loading>,
}

impl std::fmt::Debug for CudaLoader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaLoader")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl CudaLoader {
    /// Loads the CUDA runtime and ONNX Runtime, and checks that there is a device.
    ///
    /// # Errors
    /// A library or the device is missing.
    pub fn new(options: CudaOptions) -> Result<Self, DeviceError> {
        let runtime = Runtime::load()?;
        let library = OnnxLibrary::load()?;
        let upload = Upload::new(Stream::new(&runtime)?)?;
        let (major, minor) = runtime.capability;
        tracing::info!("CUDA device of compute capability {major}.{minor}");
        Ok(Self {
            library,
            runtime,
            options,
            loading: Mutex::new(Loading {
                upload,
                known: Vec::new(),
            }),
        })
    }
}

impl Loader for CudaLoader {
    type Device = CudaDevice;

    fn stage(&self, bundle: &Bundle, _run_when_installed: &SelfTestRun) -> Result<Staged, DeviceError> {
        self.runtime.select()?;
        let contract = bundle.manifest.cuda().map_err(|e| DeviceError::Flavour {
            provider: "cuda",
            detail: e.to_string(),
        })?;
        let contract = contract.ok_or_else(|| DeviceError::flavour("cuda", Flavour::Cuda))?;
        // one load at a time; the device's thread never acquires this lock
        let mut loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let Loading { upload, known } = &mut *loading;
        let identity = identity(bundle);
        known.retain(|(_, _, slots)| slots.strong_count() > 0);
        let found = known.iter().find(|known| known.0 == identity && known.1 == contract);
        let (model, slots) = if let Some(slots) = found.and_then(|(_, _, slots)| slots.upgrade()) {
            (None, slots)
        } else {
            let model = Model::load(&self.library, bundle, contract.clone(), upload, self.options)?;
            let slots = Arc::clone(model.slots());
            known.push((identity, contract, Arc::downgrade(&slots)));
            (Some(Box::new(model)), slots)
        };
        let weight_slot = slots.take()?;
        slots.fill(&weight_slot, upload, bundle, self.options.threads)?;
        Ok(Staged {
            model,
            weight_slot,
            slots,
        })
    }
}

/// Policies on the device, by slot of the engine.
#[derive(Debug, Default)]
pub struct CudaDevice {
    models: Vec<Model>,
    /// The policy's slots of each version, with its place among them.
    versions: BTreeMap<Slot, (Arc<WeightSlots>, WeightSlot)>,
    last: u64,
    /// The version and number of the prefix in the buffers.
    encoded: u64,
    durations: Option<(Duration, Duration)>,
}

/// Outputs of the prefix graph, valid until the next prefix.
#[derive(Debug, Clone, PartialEq)]
pub struct CudaPrefix {
    number: u64,
    encoded: Encoded,
}

impl CudaDevice {
    /// Returns the policy and the weight slot of a version.
    fn version(&mut self, slot: Slot) -> Result<(&mut Model, usize), DeviceError> {
        let (slots, weight_slot) = self.versions.get(&slot).ok_or(DeviceError::Slot(slot.0))?;
        let mut models = self.models.iter_mut();
        let model = models.find(|model| Arc::ptr_eq(model.slots(), slots));
        Ok((model.ok_or(DeviceError::Slot(slot.0))?, weight_slot.index))
    }

    /// Waits for the device after an error. Where that fails too, the device is lost.
    fn settled<T>(&mut self, slot: Slot, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
        let Err(error) = result else { return result };
        let Ok((model, _)) = self.version(slot) else {
            return Err(error);
        };
        match model.settle() {
            Ok(()) => Err(error),
            Err(lost) => Err(DeviceError::Lost {
                first: Box::new(error),
                source: Box::new(lost),
            }),
        }
    }

    fn try_prefix(&mut self, slot: Slot, batch: &PrefixBatch) -> Result<CudaPrefix, DeviceError> {
        let number = self.encoded;
        let (model, _) = self.version(slot)?;
        let encoded = model.prefix(batch)?;
        Ok(CudaPrefix { number, encoded })
    }

    fn try_denoise(
        &mut self,
        slot: Slot,
        prefix: &CudaPrefix,
        path: &StepPath,
    ) -> Result<Vec<StepOutput>, DeviceError> {
        let (model, index) = self.version(slot)?;
        let steps = model.denoise(index, &prefix.encoded, path)?;
        self.durations = Some(model.durations()?);
        Ok(steps)
    }

    /// Frees policies without versions. The policy of a version that is being loaded stays.
    fn sweep(&mut self) {
        let versions = &self.versions;
        self.models.retain(|model| {
            let used = versions.values().any(|(slots, _)| Arc::ptr_eq(slots, model.slots()));
            used || Arc::strong_count(model.slots()) > 1
        });
    }

    fn try_install(&mut self, slot: Slot, test: &SelfTestRun) -> Result<Vec<StepOutput>, DeviceError> {
        let (model, index) = self.version(slot)?;
        model.prepare(index, test)?;
        let encoded = model.prefix(&test.prefix)?;
        model.denoise(index, &encoded, &test.path)
    }
}

impl Device for CudaDevice {
    type Staged = Staged;
    type Prefix = CudaPrefix;

    fn install(&mut self, staged: Staged, test: &SelfTestRun) -> Result<(Slot, Vec<StepOutput>), DeviceError> {
        let Staged {
            model,
            weight_slot,
            slots,
        } = staged;
        self.sweep();
        self.models.extend(model.map(|model| *model));
        self.last += 1;
        let slot = Slot(self.last);
        self.versions.insert(slot, (slots, weight_slot));
        // the test overwrites the buffers of a prefix
        self.encoded += 1;
        let tested = self.try_install(slot, test);
        let tested = self.settled(slot, tested);
        if tested.is_err() {
            self.free(slot);
        }
        tested.map(|steps| (slot, steps))
    }

    fn prefix(&mut self, slot: Slot, batch: PrefixBatch) -> Result<CudaPrefix, DeviceError> {
        self.encoded += 1;
        let encoded = self.try_prefix(slot, &batch);
        self.settled(slot, encoded)
    }

    fn denoise(&mut self, slot: Slot, prefix: &CudaPrefix, path: &StepPath) -> Result<Vec<StepOutput>, DeviceError> {
        if prefix.number != self.encoded {
            return Err(DeviceError::Prefix);
        }
        let steps = self.try_denoise(slot, prefix, path);
        self.settled(slot, steps)
    }

    fn durations(&self) -> Option<(Duration, Duration)> {
        self.durations
    }

    fn free(&mut self, slot: Slot) {
        self.versions.remove(&slot);
        self.sweep();
    }
}
