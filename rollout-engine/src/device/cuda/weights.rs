//! Weights on the way to the device: computed by several host threads, copied in pieces through page-locked memory.

use std::{
    path::Path,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use policy::{
    derived::DerivedWeight,
    element::{ElementType, bf16_bytes, f32_bytes},
    graph::{Axis, TensorSpec},
    weights::WeightFile,
};

use super::{
    layout::Layout,
    runtime::{Event, Memory, Pinned, Range, Stream},
};
use crate::device::DeviceError;

/// Bytes of one piece. Copies of serving chunks wait for at most two pieces.
const PIECE: usize = 8 << 20;

/// Returns the layout of derived weights in one allocation.
pub(super) fn layout_of(weights: &[DerivedWeight]) -> Layout {
    let specs: Vec<TensorSpec> = weights
        .iter()
        .map(|weight| TensorSpec {
            name: weight.name.clone(),
            element: weight.element,
            axes: weight.shape.iter().copied().map(Axis::Fixed).collect(),
        })
        .collect();
    Layout::of(&specs)
}

/// Copies host bytes to the device on a stream of its own.
#[derive(Debug)]
pub(super) struct Upload {
    stream: Stream,
    pieces: [(Pinned, Event); 2],
    next: usize,
}

impl Upload {
    /// Creates the stream and the page-locked pieces.
    ///
    /// # Errors
    /// Memory is missing.
    pub(super) fn new(stream: Stream) -> Result<Self, DeviceError> {
        let piece = || {
            let memory = Memory::host(stream.runtime(), PIECE, "the upload of weights")?;
            Ok::<_, DeviceError>((memory, Event::new(stream.runtime())?))
        };
        Ok(Self {
            pieces: [piece()?, piece()?],
            stream,
            next: 0,
        })
    }

    /// Returns the stream of the copies.
    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Copies bytes to the device.
    ///
    /// # Errors
    /// The range is shorter, or the device fails.
    pub(super) fn copy(&mut self, to: Range, bytes: &[u8]) -> Result<(), DeviceError> {
        let mut done = 0;
        for part in bytes.chunks(PIECE) {
            let (memory, event) = &mut self.pieces[self.next];
            self.next = 1 - self.next;
            // the last copy from this piece
            event.wait()?;
            memory.bytes_mut()[..part.len()].copy_from_slice(part);
            self.stream
                .copy(to.part(done, part.len())?, memory.range().part(0, part.len())?)?;
            event.record(&self.stream)?;
            done += part.len();
        }
        Ok(())
    }

    /// Computes derived weights of a verified file and copies them to an allocation with the layout `layout`. Waits for the end of
    /// the copies.
    ///
    /// # Errors
    /// The file is not usable, or the device fails.
    pub(super) fn weights(
        &mut self,
        path: &Path,
        (weights, layout): (&[DerivedWeight], &Layout),
        to: Range,
        threads: usize,
    ) -> Result<(), DeviceError> {
        let bad = |source| DeviceError::Weights {
            path: path.to_owned(),
            source,
        };
        let file = WeightFile::open(path).map_err(bad)?;
        let next = AtomicUsize::new(0);
        let (sender, ready) = mpsc::sync_channel(2);
        thread::scope(|scope| {
            for _ in 0..threads.max(1) {
                let (sender, file, next) = (sender.clone(), &file, &next);
                scope.spawn(move || {
                    while let Some(weight) = weights.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let values = weight
                            .values(file)
                            .map(|values| (weight, bytes_of(&values, weight.element)));
                        if sender.send(values).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            // a failed copy drops `ready`, which ends the threads
            for computed in ready {
                let (weight, bytes) = computed.map_err(bad)?;
                self.copy(layout.range(to, &weight.name)?, &bytes)?;
            }
            self.stream.wait()
        })
    }
}

fn bytes_of(values: &[f32], element: ElementType) -> Vec<u8> {
    match element {
        ElementType::Bf16 => bf16_bytes(values),
        _ => f32_bytes(values),
    }
}
