//! Tensors in one allocation.

use policy::graph::TensorSpec;

use super::runtime::Range;
use crate::device::DeviceError;

/// Alignment of a tensor in bytes; vector loads of the kernels want 16, memory copies are fastest from 256.
const ALIGN: usize = 256;

/// Returns the bytes of a tensor whose axes are all fixed.
pub(super) fn bytes(spec: &TensorSpec) -> usize {
    spec.shape(0).iter().product::<usize>() * spec.element.size()
}

/// Places of tensors in one allocation.
#[derive(Debug, Clone, Default)]
pub(super) struct Layout {
    places: Vec<(TensorSpec, usize)>,
    /// Bytes of the allocation.
    pub(super) bytes: usize,
}

impl Layout {
    /// Places tensors one after another.
    pub(super) fn of<'a>(specs: impl IntoIterator<Item = &'a TensorSpec>) -> Self {
        let mut layout = Self::default();
        for spec in specs {
            layout.push(spec.clone());
        }
        layout
    }

    /// Places a further tensor and returns its offset.
    pub(super) fn push(&mut self, spec: TensorSpec) -> usize {
        let offset = self.bytes.next_multiple_of(ALIGN);
        self.bytes = offset + bytes(&spec);
        self.places.push((spec, offset));
        offset
    }

    /// Returns the offset and the length of a tensor.
    ///
    /// # Errors
    /// There is no such tensor.
    pub(super) fn find(&self, name: &str) -> Result<(usize, usize), DeviceError> {
        let place = self.places.iter().find(|(spec, _)| spec.name == name);
        place
            .map(|(spec, offset)| (*offset, bytes(spec)))
            .ok_or_else(|| DeviceError::Contract {
                graph: "cuda",
                name: name.to_owned(),
            })
    }

    /// Returns the range of a tensor in an allocation with this layout.
    ///
    /// # Errors
    /// There is no such tensor, or the allocation is shorter.
    pub(super) fn range(&self, memory: Range, name: &str) -> Result<Range, DeviceError> {
        let (offset, bytes) = self.find(name)?;
        memory.part(offset, bytes)
    }
}

#[cfg(test)]
mod tests {
    use policy::{element::ElementType, graph::Axis};

    use super::*;

    #[test]
    fn tensors_lie_apart_at_multiples_of_the_alignment() {
        let spec = |name: &str, element, sizes: &[usize]| TensorSpec {
            name: name.to_owned(),
            element,
            axes: sizes.iter().copied().map(Axis::Fixed).collect(),
        };
        let specs = [
            spec("a", ElementType::F32, &[3, 5]),
            spec("b", ElementType::Bf16, &[129]),
            spec("c", ElementType::I64, &[]),
        ];
        let layout = Layout::of(&specs);
        assert_eq!(layout.find("a").expect("a"), (0, 60));
        assert_eq!(layout.find("b").expect("b"), (256, 258));
        assert_eq!(layout.find("c").expect("c"), (768, 8));
        assert_eq!(layout.bytes, 776);
        assert!(layout.find("d").is_err());
    }
}
