//! A policy on the device: sessions of its graphs, the vision-language weights, slots of expert weights, and all buffers.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use policy::{
    bundle::{Bundle, EXPERT_WEIGHTS, VLM_WEIGHTS},
    cuda::{Attention, CACHED, CONDITION_GRAPH, CudaContract, LAST, LENGTH, MODULATION, STATE_GRAPH, keys, values},
    derived::{DerivedWeight, condition_weights, expert_weights, head_weights, state_weights},
    dims::Variant,
    element::{ElementType, f32_bytes},
    flow::time_embedding,
    graph::{
        Axis, C_V, C_X, DENOISE_GRAPH, IMAGES, MEAN, POOLED, PROMPT, STATE, STD, STEP_STD, TIME_EMB, TensorSpec, VALUE,
        X_NEXT, X_T, Z,
    },
};

use super::{
    graphs::{Bound, CudaOptions, Graph},
    layout::{Layout, bytes},
    runtime::{Event, Memory, Pinned, Range, Stream},
    weights::{Upload, layout_of},
};
use crate::device::{DeviceError, PathStep, PrefixBatch, SelfTestRun, StepOutput, StepPath, library::OnnxLibrary};

/// Expert weights in memory at once: of the live version, of its predecessor, which a large request may still use, and of the next one.
const SLOTS: usize = 3;
/// Longest wait for a slot; a version older than the predecessor is left at the next part of a request.
const PATIENCE: Duration = Duration::from_secs(30);

fn spec(name: &str, element: ElementType, sizes: &[usize]) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        element,
        axes: sizes.iter().copied().map(Axis::Fixed).collect(),
    }
}

/// Slots of expert weights; versions of the same vision-language weights and graphs share them.
#[derive(Debug)]
pub(super) struct WeightSlots {
    weights: Vec<DerivedWeight>,
    layout: Layout,
    memory: Vec<Memory>,
    free: Mutex<Vec<usize>>,
    freed: Condvar,
}

/// A slot in use; returned when dropped.
#[derive(Debug)]
pub(super) struct WeightSlot {
    slots: Arc<WeightSlots>,
    pub(super) index: usize,
}

impl Drop for WeightSlot {
    fn drop(&mut self) {
        let mut free = self.slots.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(self.index);
        self.slots.freed.notify_all();
    }
}

impl WeightSlots {
    fn new(contract: &CudaContract, stream: &Stream) -> Result<Self, DeviceError> {
        let weights = [
            expert_weights(&contract.dims, contract.element),
            state_weights(&contract.dims),
            condition_weights(&contract.dims),
            head_weights(&contract.dims, &contract.heads),
        ]
        .concat();
        let layout = layout_of(&weights);
        let slot = || Memory::device(stream, layout.bytes, "the weights of a policy version");
        Ok(Self {
            memory: (0..SLOTS).map(|_| slot()).collect::<Result<_, _>>()?,
            weights,
            layout,
            free: Mutex::new((0..SLOTS).collect()),
            freed: Condvar::new(),
        })
    }

    /// Takes a free slot, and waits for one while all serve.
    ///
    /// # Errors
    /// Both slots are in use for longer than the patience.
    pub(super) fn take(self: &Arc<Self>) -> Result<WeightSlot, DeviceError> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut free, _) = self
            .freed
            .wait_timeout_while(free, PATIENCE, |free| free.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let index = free.pop().ok_or(DeviceError::Busy)?;
        Ok(WeightSlot {
            slots: Arc::clone(self),
            index,
        })
    }

    /// Copies the expert weights of a bundle to a slot.
    ///
    /// # Errors
    /// The file is not usable, or the device fails.
    pub(super) fn fill(
        &self,
        weight_slot: &WeightSlot,
        upload: &mut Upload,
        bundle: &Bundle,
        threads: usize,
    ) -> Result<(), DeviceError> {
        let path = bundle.path(EXPERT_WEIGHTS);
        let to = self.memory[weight_slot.index].range();
        upload.weights(&path, (&self.weights, &self.layout), to, threads)
    }
}

/// The graphs with their bindings, by slot where they read expert weights.
#[derive(Debug)]
struct Graphs {
    /// By number of present cameras, from 1.
    prefix: Vec<(Graph, Bound)>,
    /// pi0's state token.
    state: Option<(Graph, Vec<Bound>)>,
    /// pi0.5's modulation of the norms.
    condition: Option<(Graph, Vec<Bound>)>,
    denoise: (Graph, Vec<Bound>),
}

/// Buffers of a chunk. Names of tensors are those of the graphs; further names are explained at [`Buffers::new`].
#[derive(Debug)]
struct Buffers {
    row: (Layout, Memory),
    prefix_out: (Layout, Memory),
    cache: (Layout, Memory),
    chunk: (Layout, Memory),
    step_in: (Layout, Memory),
    step_out: (Layout, Memory),
    results: Memory,
    /// Step table of each slot.
    times: Vec<Memory>,
    host_rows: Pinned,
    host_chunk: Pinned,
    host_results: Pinned,
    host_x: Pinned,
    host_times: Pinned,
}

/// Names in the chunk buffer, which one copy fills.
const X_START: &str = "x_start";
const STATE_LAST: &str = "state.last";
const POSITION: &str = "position";
const TABLE: &str = "table";
const NOISE: &str = "noise";

impl Buffers {
    fn new(contract: &CudaContract, stream: &Stream) -> Result<Self, DeviceError> {
        let (dims, batch, k) = (&contract.dims, contract.batch, contract.num_steps);
        let side = dims.vision.image_size;
        let device = |layout: &Layout| Memory::device(stream, layout.bytes, "the buffers of a chunk");
        // one row of the prefix graph; the images last, so that fewer cameras are a shorter copy
        let row = Layout::of(&[
            spec(PROMPT, ElementType::I64, &[1, dims.prompt_len]),
            spec(LENGTH, ElementType::I64, &[1]),
            spec(IMAGES, ElementType::U8, &[dims.cameras, side, side, 3]),
        ]);
        // keys and values of all layers without gaps, so that one copy moves them
        let longest = contract.prefix_len(dims.cameras);
        let prefix_out = Layout::of(&[
            spec("cache", contract.element, &[2 * dims.depth, longest, dims.head_dim]),
            spec(POOLED, ElementType::F32, &[1, dims.vlm.width]),
        ]);
        let cache = Layout::of(&[
            spec(
                "cache",
                contract.element,
                &[2 * dims.depth, batch, contract.capacity(), dims.head_dim],
            ),
            spec(POOLED, ElementType::F32, &[batch, dims.vlm.width]),
        ]);
        let actions = [batch, dims.action_horizon, dims.action_dim];
        // a row of the step table: `c_x`, `c_v`, `std`
        let step_in = Layout::of(&[
            spec(C_X, ElementType::F32, &[batch]),
            spec(C_V, ElementType::F32, &[batch]),
            spec(STD, ElementType::F32, &[batch]),
            spec(Z, ElementType::F32, &actions),
            time_spec(contract, 1),
        ]);
        let table_row = step_in.find(Z)?.0;
        let noise_row = bytes(&spec(Z, ElementType::F32, &actions));
        let chunk = Layout::of(&[
            spec(X_START, ElementType::F32, &actions),
            spec(STATE, ElementType::F32, &[batch, dims.action_dim]),
            spec(STATE_LAST, ElementType::I32, &[batch]),
            spec(POSITION, ElementType::I64, &[batch]),
            spec(TABLE, ElementType::U8, &[k, table_row]),
            // noise of the stochastic steps, packed
            spec(NOISE, ElementType::U8, &[k, noise_row]),
        ]);
        let mut step_out = Layout::of(&[
            spec(X_T, ElementType::F32, &actions),
            spec(MEAN, ElementType::F32, &actions),
        ]);
        if contract.heads.noise.is_some() {
            step_out.push(spec(STEP_STD, ElementType::F32, &actions));
        }
        if contract.heads.value.is_some() {
            step_out.push(spec(VALUE, ElementType::F32, &[batch]));
        }
        let time = bytes(&time_spec(contract, k));
        let times = || Memory::device(stream, time, "the step table of a policy version");
        let host = |bytes: usize| Memory::host(stream.runtime(), bytes, "the transfer of a chunk");
        Ok(Self {
            host_rows: host(batch * row.bytes)?,
            host_chunk: host(chunk.bytes)?,
            host_results: host(k * step_out.bytes)?,
            host_x: host(noise_row)?,
            host_times: host(k * dims.expert.width * size_of::<f32>())?,
            results: Memory::device(stream, k * step_out.bytes, "the buffers of a chunk")?,
            times: (0..SLOTS).map(|_| times()).collect::<Result<_, _>>()?,
            row: (row.clone(), device(&row)?),
            prefix_out: (prefix_out.clone(), device(&prefix_out)?),
            cache: (cache.clone(), device(&cache)?),
            chunk: (chunk.clone(), device(&chunk)?),
            step_in: (step_in.clone(), device(&step_in)?),
            step_out: (step_out.clone(), device(&step_out)?),
        })
    }

    /// Returns the range of keys or values of a layer in the buffers of all rows.
    fn cached(&self, contract: &CudaContract, name: &str) -> Option<Result<Range, DeviceError>> {
        let number = layer_number(contract, name)?;
        let size = contract.batch * contract.capacity() * contract.dims.head_dim * contract.element.size();
        let (layout, memory) = &self.cache;
        Some(
            layout
                .range(memory.range(), "cache")
                .and_then(|all| all.part(number * size, size)),
        )
    }
}

/// Returns the place of a layer's keys or values, or of their in-place outputs, among `k.0, v.0, k.1, ...`.
fn layer_number(contract: &CudaContract, name: &str) -> Option<usize> {
    let base = name.strip_suffix(".next").unwrap_or(name);
    (0..contract.dims.depth)
        .flat_map(|l| [keys(l), values(l)])
        .position(|known| known == base)
}

/// Returns the tensor that tells a denoise graph its time: the time embedding, or pi0.5's modulation.
fn time_spec(contract: &CudaContract, steps: usize) -> TensorSpec {
    let width = contract.dims.expert.width;
    match contract.dims.variant {
        Variant::Pi0 => spec(TIME_EMB, ElementType::F32, &[steps, width]),
        Variant::Pi05 => spec(
            MODULATION,
            contract.element,
            &[steps, (2 * contract.dims.depth + 1) * 3 * width],
        ),
    }
}

/// A policy on the device.
#[derive(Debug)]
pub(super) struct Model {
    graphs: Graphs,
    buffers: Buffers,
    contract: CudaContract,
    /// Flow times of the version in each slot, of which its step table is made.
    times: Vec<Vec<f64>>,
    /// Input of the condition graph.
    time_emb: Memory,
    slots: Arc<WeightSlots>,
    _vlm: (Layout, Memory),
    /// Start and end of the last prefix and end of the last denoise steps, for measurements.
    timestamps: [Event; 3],
    stream: Stream,
    ready: bool,
}

/// What the device knows of the last prefix.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Encoded {
    /// Valid prefix tokens of each row.
    lengths: Vec<usize>,
    state: Vec<f32>,
}

impl Model {
    /// Loads graphs and vision-language weights of a bundle.
    ///
    /// # Errors
    /// A graph or the weights are not usable, or the device has not enough memory.
    pub(super) fn load(
        library: &OnnxLibrary,
        bundle: &Bundle,
        contract: CudaContract,
        upload: &mut Upload,
        options: CudaOptions,
    ) -> Result<Self, DeviceError> {
        // a stream of its own: a failure during the captures leaves the live policy alone
        let stream = Stream::new(upload.stream().runtime())?;
        let weights = contract.prefix_weights();
        let layout = layout_of(&weights);
        let vlm = Memory::device(
            upload.stream(),
            layout.bytes,
            "the weights of the vision-language model",
        )?;
        let path = bundle.path(VLM_WEIGHTS);
        upload.weights(&path, (&weights, &layout), vlm.range(), options.threads)?;
        let slots = Arc::new(WeightSlots::new(&contract, upload.stream())?);
        let buffers = Buffers::new(&contract, &stream)?;
        let time_bytes = contract.num_steps * contract.dims.expert.width * size_of::<f32>();
        let time_emb = Memory::device(&stream, time_bytes, "the step table of a policy version")?;
        let loader = GraphLoader {
            library,
            bundle,
            contract: &contract,
            stream: &stream,
            options,
            buffers: &buffers,
            slots: &slots,
            time_emb: time_emb.range(),
            vlm: (&layout, vlm.range()),
        };
        let graphs = loader.graphs()?;
        // the allocations were filled with zeros on two streams
        stream.wait()?;
        upload.stream().wait()?;
        let event = || Event::new(stream.runtime());
        Ok(Self {
            graphs,
            buffers,
            times: vec![Vec::new(); SLOTS],
            time_emb,
            slots,
            _vlm: (layout, vlm),
            timestamps: [event()?, event()?, event()?],
            contract,
            stream,
            ready: false,
        })
    }

    /// Returns the slots.
    pub(super) fn slots(&self) -> &Arc<WeightSlots> {
        &self.slots
    }

    /// Prepares the version in a slot: its step table, and once per policy the captures of all graphs, so that no request waits
    /// for a capture.
    ///
    /// # Errors
    /// A run fails.
    pub(super) fn prepare(&mut self, slot: usize, test: &SelfTestRun) -> Result<(), DeviceError> {
        let times: Vec<f64> = test.path.steps.iter().map(|step| step.t).collect();
        if times.len() != self.contract.num_steps {
            return Err(self.other_path(times.len()));
        }
        let width = self.contract.dims.expert.width;
        let embedding: Vec<f32> = times.iter().flat_map(|t| time_embedding(*t, width)).collect();
        put(self.buffers.host_times.bytes_mut(), 0, &f32_bytes(&embedding))?;
        let host = self.buffers.host_times.range();
        if let Some((graph, bound)) = &mut self.graphs.condition {
            self.stream.copy(self.time_emb.range(), host)?;
            graph.run(&bound[slot])?;
        } else {
            self.stream.copy(self.buffers.times[slot].range(), host)?;
        }
        self.stream.wait()?;
        self.times[slot].clone_from(&times);
        if !self.ready {
            // the first run of a graph captures it; the inputs are valid, because kernels address memory by them
            for cameras in 1..self.contract.dims.cameras {
                let mut batch = test.prefix.clone();
                for row in batch.image_mask.chunks_mut(self.contract.dims.cameras) {
                    row.fill(false);
                    row[..cameras].fill(true);
                }
                let encoded = self.prefix(&batch)?;
                let steps = self.denoise(slot, &encoded, &test.path)?;
                if !steps.iter().flat_map(|step| &step.x_next).all(|x| x.is_finite()) {
                    return Err(DeviceError::NotFinite { cameras });
                }
            }
            let encoded = self.prefix(&test.prefix)?;
            for other in 0..SLOTS {
                let own = std::mem::replace(&mut self.times[other], times.clone());
                self.denoise(other, &encoded, &test.path)?;
                self.times[other] = own;
            }
            self.ready = true;
        }
        Ok(())
    }

    fn other_path(&self, found: usize) -> DeviceError {
        DeviceError::Path {
            expected: self.contract.num_steps,
            found,
        }
    }

    /// Starts the prefix of all rows.
    ///
    /// # Errors
    /// The batch has another number of rows, a row has no image, or a run fails.
    pub(super) fn prefix(&mut self, batch: &PrefixBatch) -> Result<Encoded, DeviceError> {
        let dims = &self.contract.dims;
        if batch.rows != self.contract.batch {
            return Err(DeviceError::Rows {
                expected: self.contract.batch,
                found: batch.rows,
            });
        }
        let buffers = &mut self.buffers;
        let (layout, row) = &buffers.row;
        let image = dims.vision.image_size.pow(2) * 3;
        let (prompt_at, _) = layout.find(PROMPT)?;
        let (length_at, _) = layout.find(LENGTH)?;
        let (images_at, _) = layout.find(IMAGES)?;
        let mut lengths = Vec::with_capacity(batch.rows);
        let mut used = Vec::with_capacity(batch.rows);
        for (number, host) in buffers.host_rows.bytes_mut().chunks_exact_mut(layout.bytes).enumerate() {
            let (cameras, prompt) = (number * dims.cameras, number * dims.prompt_len);
            let mut end = images_at;
            for camera in cameras..cameras + dims.cameras {
                if batch.image_mask.get(camera) == Some(&true) {
                    let from = batch.images.get(camera * image..(camera + 1) * image);
                    put(host, end, from.ok_or_else(|| short(IMAGES))?)?;
                    end += image;
                }
            }
            let ids = batch
                .prompt
                .get(prompt..prompt + dims.prompt_len)
                .ok_or_else(|| short(PROMPT))?;
            let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            put(host, prompt_at, &ids)?;
            let mask = batch.prompt_mask.get(prompt..prompt + dims.prompt_len);
            let valid = valid_tokens(mask.ok_or_else(|| short(PROMPT))?)?;
            let present = (end - images_at) / image;
            let length = present * dims.vision.tokens() + valid;
            put(host, length_at, &(length as i64).to_le_bytes())?;
            if present == 0 {
                return Err(DeviceError::NoImage { row: number });
            }
            lengths.push(length);
            used.push((present, end));
        }
        self.timestamps[0].record(&self.stream)?;
        let element = self.contract.element.size();
        let layers = 2 * dims.depth;
        let pitch = self.contract.capacity() * dims.head_dim * element;
        let cache = buffers.cache.0.range(buffers.cache.1.range(), "cache")?;
        let row_of = |number: usize| cache.part(number * pitch, cache.bytes - number * pitch);
        let all_pooled = buffers.cache.0.range(buffers.cache.1.range(), POOLED)?;
        let pooled = buffers.prefix_out.0.range(buffers.prefix_out.1.range(), POOLED)?;
        let first = used.first().copied();
        for (number, (present, end)) in used.into_iter().enumerate() {
            let bytes = self.contract.prefix_len(present) * dims.head_dim * element;
            let from = buffers.host_rows.range().part(number * layout.bytes, end)?;
            // padding repeats the first row
            if number > 0
                && first == Some((present, end))
                && same_rows(buffers.host_rows.bytes(), layout.bytes, number, end)
            {
                let rows = (row_of(0)?, self.contract.batch * pitch);
                self.stream
                    .copy_rows((row_of(number)?, self.contract.batch * pitch), rows, bytes, layers)?;
                if self.contract.pooled() {
                    let to = all_pooled.part(number * pooled.bytes, pooled.bytes)?;
                    self.stream.copy(to, all_pooled.part(0, pooled.bytes)?)?;
                }
                continue;
            }
            self.stream.copy(row.range(), from)?;
            let (graph, bound) = self
                .graphs
                .prefix
                .get_mut(present - 1)
                .ok_or(DeviceError::NoImage { row: number })?;
            graph.run(bound)?;
            let from = buffers.prefix_out.0.range(buffers.prefix_out.1.range(), "cache")?;
            self.stream.copy_rows(
                (row_of(number)?, self.contract.batch * pitch),
                (from, bytes),
                bytes,
                layers,
            )?;
            if self.contract.pooled() {
                self.stream
                    .copy(all_pooled.part(number * pooled.bytes, pooled.bytes)?, pooled)?;
            }
        }
        self.timestamps[1].record(&self.stream)?;
        Ok(Encoded {
            lengths,
            state: batch.state.clone(),
        })
    }

    /// Runs all denoise steps of the version in a slot.
    ///
    /// # Errors
    /// The path has other flow times than the version, or a run fails.
    pub(super) fn denoise(
        &mut self,
        slot: usize,
        encoded: &Encoded,
        path: &StepPath,
    ) -> Result<Vec<StepOutput>, DeviceError> {
        let known = self.times[slot].iter();
        if path.steps.len() != self.contract.num_steps || !path.steps.iter().map(|step| step.t).eq(known.copied()) {
            return Err(self.other_path(path.steps.len()));
        }
        let drawn = self.write_chunk(encoded, path)?;
        let buffers = &mut self.buffers;
        let (layout, memory) = &buffers.chunk;
        let (noise_at, _) = layout.find(NOISE)?;
        let noise = buffers.host_x.range().bytes;
        let upload = noise_at + drawn.iter().flatten().count() * noise;
        self.stream
            .copy(memory.range(), buffers.host_chunk.range().part(0, upload)?)?;
        let chunk = |name| layout.range(memory.range(), name);
        let (out_layout, out) = &buffers.step_out;
        let x = out_layout.range(out.range(), X_T)?;
        self.stream.copy(x, chunk(X_START)?)?;
        if let Some((graph, bound)) = &mut self.graphs.state {
            graph.run(&bound[slot])?;
        }
        let (in_layout, step_in) = &buffers.step_in;
        let z = in_layout.range(step_in.range(), Z)?;
        let time = in_layout.range(step_in.range(), &time_spec(&self.contract, 1).name)?;
        let table_row = in_layout.find(Z)?.0;
        let result = out_layout.bytes;
        let guided = path.guidance.iter().any(Option::is_some);
        let elements = self.contract.dims.action_horizon * self.contract.dims.action_dim;
        for (k, drawn) in drawn.iter().enumerate() {
            self.stream
                .copy(step_in.range(), chunk(TABLE)?.part(k * table_row, table_row)?)?;
            self.stream
                .copy(time, buffers.times[slot].range().part(k * time.bytes, time.bytes)?)?;
            if let Some(number) = drawn {
                self.stream.copy(z, chunk(NOISE)?.part(number * noise, noise)?)?;
            }
            let (graph, bound) = &mut self.graphs.denoise;
            graph.run(&bound[slot])?;
            if guided {
                self.stream.copy(buffers.host_x.range(), x)?;
                self.stream.wait()?;
                let mut corrected = floats(buffers.host_x.bytes());
                for (guidance, row) in path.guidance.iter().zip(corrected.chunks_mut(elements)) {
                    if let Some(guidance) = guidance {
                        guidance.correct(row, self.contract.dims.action_dim, k, path.steps.len());
                    }
                }
                put(buffers.host_x.bytes_mut(), 0, &f32_bytes(&corrected))?;
                self.stream.copy(x, buffers.host_x.range())?;
            }
            self.stream.copy(
                buffers.results.range().part(k * result, result)?,
                out.range().part(0, result)?,
            )?;
        }
        self.stream
            .copy(buffers.host_results.range(), buffers.results.range())?;
        self.timestamps[2].record(&self.stream)?;
        self.stream.wait()?;
        let read = |k: usize, name: &str| {
            let (offset, bytes) = out_layout.find(name)?;
            let from = k * result + offset;
            let bytes = buffers.host_results.bytes().get(from..from + bytes);
            Ok::<_, DeviceError>(floats(bytes.ok_or_else(|| short(MEAN))?))
        };
        let (noise_head, value_head) = (self.contract.heads.noise.is_some(), self.contract.heads.value.is_some());
        let outputs: Vec<StepOutput> = (0..path.steps.len())
            .map(|k| {
                Ok(StepOutput {
                    x_next: read(k, X_T)?,
                    mean: read(k, MEAN)?,
                    step_std: noise_head.then(|| read(k, STEP_STD)).transpose()?,
                    value: value_head.then(|| read(k, VALUE)).transpose()?,
                })
            })
            .collect::<Result<_, DeviceError>>()?;
        if !outputs.iter().flat_map(|step| &step.x_next).all(|x| x.is_finite()) {
            // what is not a number must not stay behind the valid tokens of a later chunk
            self.stream.zero(buffers.cache.1.range())?;
        }
        Ok(outputs)
    }

    /// Waits for all operations after an error, so that no copy reads or writes memory that the next call uses.
    ///
    /// # Errors
    /// The device no longer works.
    pub(super) fn settle(&self) -> Result<(), DeviceError> {
        self.stream.wait()
    }

    /// Returns the time on the device of the last prefix and of the last denoise steps.
    ///
    /// # Errors
    /// The device fails.
    pub(super) fn durations(&self) -> Result<(Duration, Duration), DeviceError> {
        let [start, encoded, end] = &self.timestamps;
        let prefix = Duration::from_secs_f64(encoded.seconds_since(start)?.max(0.0));
        Ok((prefix, Duration::from_secs_f64(end.seconds_since(encoded)?.max(0.0))))
    }

    /// Writes the upload of a chunk. Returns for each step the number of its noise; `None` for a step without noise.
    fn write_chunk(&mut self, encoded: &Encoded, path: &StepPath) -> Result<Vec<Option<usize>>, DeviceError> {
        let dims = &self.contract.dims;
        let (layout, _) = &self.buffers.chunk;
        let table = self.buffers.step_in.0.clone();
        let host = self.buffers.host_chunk.bytes_mut();
        fill(host, layout, X_START, &path.initial)?;
        fill(host, layout, STATE, &encoded.state)?;
        let own = dims.suffix_len() - dims.action_horizon;
        for (row, length) in encoded.lengths.iter().enumerate() {
            put(
                host,
                layout.find(STATE_LAST)?.0 + 4 * row,
                &(*length as i32).to_le_bytes(),
            )?;
            let at = layout.find(POSITION)?.0;
            match self.contract.attention {
                Attention::Grouped => {
                    let last = length + dims.suffix_len() - 1;
                    put(host, at + 4 * row, &(last as i32).to_le_bytes())?;
                }
                Attention::General => put(host, at + 8 * row, &((length + own) as i64).to_le_bytes())?,
            }
        }
        let (table_at, _) = layout.find(TABLE)?;
        let (noise_at, _) = layout.find(NOISE)?;
        let table_row = table.find(Z)?.0;
        let mut drawn = Vec::with_capacity(path.steps.len());
        let mut next = noise_at;
        for (k, step) in path.steps.iter().enumerate() {
            let PathStep { c_x, c_v, std, z, .. } = step;
            for (name, values) in [(C_X, c_x), (C_V, c_v), (STD, std)] {
                let at = table_at + k * table_row + table.find(name)?.0;
                put(host, at, &f32_bytes(values))?;
            }
            if std.iter().all(|std| *std == 0.0) {
                drawn.push(None);
                continue;
            }
            if z.len() != path.initial.len() {
                return Err(short(Z));
            }
            let z = f32_bytes(z);
            put(host, next, &z)?;
            drawn.push(Some((next - noise_at) / z.len().max(1)));
            next += z.len();
        }
        Ok(drawn)
    }
}

fn short(name: &str) -> DeviceError {
    DeviceError::Contract {
        graph: "cuda",
        name: name.to_owned(),
    }
}

/// Writes all values of an f32 tensor.
fn fill(host: &mut [u8], layout: &Layout, name: &str, values: &[f32]) -> Result<(), DeviceError> {
    let (at, bytes) = layout.find(name)?;
    if size_of_val(values) != bytes {
        return Err(short(name));
    }
    put(host, at, &f32_bytes(values))
}

/// Writes bytes at an offset.
fn put(host: &mut [u8], at: usize, bytes: &[u8]) -> Result<(), DeviceError> {
    let to = host.get_mut(at..at + bytes.len());
    to.ok_or_else(|| short("host buffer"))?.copy_from_slice(bytes);
    Ok(())
}

/// Returns whether row `number` of rows of `stride` bytes begins with the same `bytes` bytes as the first one.
fn same_rows(rows: &[u8], stride: usize, number: usize, bytes: usize) -> bool {
    let row = |number: usize| rows.get(number * stride..number * stride + bytes);
    row(0).is_some() && row(0) == row(number)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

/// Returns the number of valid tokens of a prompt, which come first.
fn valid_tokens(mask: &[bool]) -> Result<usize, DeviceError> {
    let valid = mask.iter().take_while(|valid| **valid).count();
    if mask.iter().skip(valid).any(|valid| *valid) {
        return Err(DeviceError::Prompt { token: valid });
    }
    Ok(valid)
}

/// A graph that reads expert weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    State,
    Condition,
    Denoise,
}

/// Loads and binds the graphs of a policy.
struct GraphLoader<'a> {
    library: &'a OnnxLibrary,
    bundle: &'a Bundle,
    contract: &'a CudaContract,
    stream: &'a Stream,
    options: CudaOptions,
    buffers: &'a Buffers,
    slots: &'a WeightSlots,
    time_emb: Range,
    vlm: (&'a Layout, Range),
}

impl GraphLoader<'_> {
    fn graphs(&self) -> Result<Graphs, DeviceError> {
        let dims = &self.contract.dims;
        let prefix = (1..=dims.cameras).map(|cameras| self.prefix(cameras));
        let load = |file: &str, name, contract, capture| {
            let path = self.bundle.path(file);
            Graph::load(
                self.library,
                &path,
                (name, contract),
                self.stream,
                (self.options, capture),
            )
        };
        let state = match self.contract.state() {
            Some(contract) => Some(self.per_slot(load(STATE_GRAPH, "state", contract, true)?, Part::State)?),
            None => None,
        };
        let condition = match self.contract.condition() {
            Some(contract) => {
                let graph = load(CONDITION_GRAPH, "condition", contract, false)?;
                Some(self.per_slot(graph, Part::Condition)?)
            }
            None => None,
        };
        Ok(Graphs {
            prefix: prefix.collect::<Result<_, _>>()?,
            state,
            condition,
            denoise: self.per_slot(
                load(DENOISE_GRAPH, "denoise", self.contract.denoise(), true)?,
                Part::Denoise,
            )?,
        })
    }

    fn prefix(&self, cameras: usize) -> Result<(Graph, Bound), DeviceError> {
        let path = self.bundle.path(&self.contract.prefix_file(cameras));
        let contract = self.contract.prefix(cameras);
        let graph = Graph::load(
            self.library,
            &path,
            ("prefix", contract),
            self.stream,
            (self.options, true),
        )?;
        let (row, out) = (&self.buffers.row, &self.buffers.prefix_out);
        let bound = graph.bind(1, |spec| {
            if let Some(number) = layer_number(self.contract, &spec.name) {
                let size = bytes(spec);
                return out.0.range(out.1.range(), "cache")?.part(number * size, size);
            }
            match spec.name.as_str() {
                POOLED => out.0.range(out.1.range(), POOLED),
                name @ (PROMPT | LENGTH | IMAGES) => row.0.range(row.1.range(), name),
                weight => self.vlm.0.range(self.vlm.1, weight),
            }
        })?;
        Ok((graph, bound))
    }

    /// Binds a graph that reads expert weights to each slot.
    fn per_slot(&self, graph: Graph, part: Part) -> Result<(Graph, Vec<Bound>), DeviceError> {
        let bind = |slot: usize| graph.bind(slot + 1, |spec| self.place(spec, slot, part));
        let bound = (0..SLOTS).map(bind).collect::<Result<_, _>>()?;
        Ok((graph, bound))
    }

    /// Returns the place of a tensor of the state, condition or denoise graph.
    fn place(&self, spec: &TensorSpec, slot: usize, part: Part) -> Result<Range, DeviceError> {
        let buffers = self.buffers;
        if let Some(cached) = buffers.cached(self.contract, &spec.name) {
            return cached;
        }
        let of = |(layout, memory): &(Layout, Memory), name: &str| layout.range(memory.range(), name);
        match spec.name.as_str() {
            POOLED => of(&buffers.cache, POOLED),
            STATE => of(&buffers.chunk, STATE),
            LAST if part == Part::State => of(&buffers.chunk, STATE_LAST),
            LAST | CACHED => of(&buffers.chunk, POSITION),
            // the condition graph computes the table of all steps, the denoise graph reads a row of it
            TIME_EMB if part == Part::Condition => Ok(self.time_emb),
            MODULATION if part == Part::Condition => Ok(buffers.times[slot].range()),
            name @ (TIME_EMB | MODULATION | C_X | C_V | STD | Z) => of(&buffers.step_in, name),
            // the next `x` replaces the last one
            X_T | X_NEXT => of(&buffers.step_out, X_T),
            name @ (MEAN | STEP_STD | VALUE) => of(&buffers.step_out, name),
            weight => self.slots.layout.range(self.slots.memory[slot].range(), weight),
        }
    }
}
