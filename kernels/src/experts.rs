use crate::error::{KernelError, check_index, check_shape};
use crate::format::WeightFormat;
use crate::pack::{PanelPart, WeightRows};
use crate::packed::{PANEL, PackedMatrix, PackedMatrixBuilder};

/// The routed experts of one layer: `gate`, `up` `[inter, hidden]` and `down` `[hidden, inter]` for each.
///
/// Gate and up panels alternate, so that one pass over an expert's bytes gives `silu(gate x) * (up x)`; every expert
/// starts on a panel. A clone shares the bytes.
#[derive(Clone)]
pub struct PackedExperts {
    /// Panel `(expert * panels(inter) + j) * 2` holds gate rows `64 j..`, the next one the same up rows.
    pub(crate) gate_up: PackedMatrix,
    /// Panel `expert * panels(hidden) + j` holds down rows `64 j..`.
    pub(crate) down: PackedMatrix,
    shape: ExpertsShape,
}

/// A matrix of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertMatrix {
    /// `[inter, hidden]`.
    Gate,
    /// `[inter, hidden]`.
    Up,
    /// `[hidden, inter]`.
    Down,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ExpertsShape {
    num_experts: usize,
    hidden: usize,
    inter: usize,
}

impl PackedExperts {
    /// A builder whose weights are all zero until they are put.
    pub fn builder(
        num_experts: usize,
        hidden: usize,
        inter: usize,
        gate_up: impl Into<WeightFormat>,
        down: impl Into<WeightFormat>,
    ) -> PackedExpertsBuilder {
        let (gate_up, down) = (gate_up.into(), down.into());
        let padded = |rows: usize| num_experts * rows.div_ceil(PANEL) * PANEL;
        PackedExpertsBuilder {
            gate_up: PackedMatrix::zeros(2 * padded(inter), hidden, gate_up),
            down: PackedMatrix::zeros(padded(hidden), inter, down),
            shape: ExpertsShape { num_experts, hidden, inter },
        }
    }

    /// Number of routed experts.
    pub fn num_experts(&self) -> usize {
        self.shape.num_experts
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.shape.hidden
    }

    /// Width inside an expert.
    pub fn inter(&self) -> usize {
        self.shape.inter
    }

    /// How gate and up are stored, and how down is.
    pub fn formats(&self) -> [WeightFormat; 2] {
        [self.gate_up.format(), self.down.format()]
    }

    /// Size in memory, padding included.
    pub fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }

    /// Panel of `gate_up` with gate rows `64 panel..` of an expert; the up rows follow.
    pub(crate) fn gate_panel(&self, expert: usize, panel: usize) -> usize {
        (expert * self.shape.inter.div_ceil(PANEL) + panel) * 2
    }

    /// Panel of `down` with rows `64 panel..` of an expert.
    pub(crate) fn down_panel(&self, expert: usize, panel: usize) -> usize {
        expert * self.shape.hidden.div_ceil(PANEL) + panel
    }
}

impl std::fmt::Debug for PackedExperts {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ExpertsShape { num_experts, hidden, inter } = self.shape;
        let [gate_up, down] = self.formats();
        write!(out, "PackedExperts({num_experts} x [{hidden}, {inter}] {gate_up}, {down})")
    }
}

/// Packed experts while their weights are being put.
pub struct PackedExpertsBuilder {
    gate_up: PackedMatrixBuilder,
    down: PackedMatrixBuilder,
    shape: ExpertsShape,
}

impl PackedExpertsBuilder {
    /// Packs a matrix of an expert.
    pub fn put<'r>(
        &mut self,
        expert: usize,
        matrix: ExpertMatrix,
        rows: impl Into<WeightRows<'r>>,
    ) -> Result<(), KernelError> {
        const OP: &str = "put experts";
        let (rows, ExpertsShape { num_experts, hidden, inter }) = (rows.into(), self.shape);
        // An expert's rows go into every `step`th panel, the first of them `skipped` panels from where it starts.
        let (to, [count, width], step, skipped) = match matrix {
            ExpertMatrix::Gate => (&mut self.gate_up, [inter, hidden], 2, 0),
            ExpertMatrix::Up => (&mut self.gate_up, [inter, hidden], 2, 1),
            ExpertMatrix::Down => (&mut self.down, [hidden, inter], 1, 0),
        };
        rows.check(to.format())?;
        check_index(OP, "expert", expert, num_experts)?;
        check_shape(OP, "weight", &rows.shape(), &[count, width])?;
        let panels = count.div_ceil(PANEL);
        let panel = |index| (expert * panels + index) * step + skipped;
        to.put_panels(panels, |index| part(panel(index), index, count), rows);
        Ok(())
    }

    /// How gate and up will be stored, and how down will be.
    pub fn formats(&self) -> [WeightFormat; 2] {
        [self.gate_up.format(), self.down.format()]
    }

    /// The packed experts.
    pub fn finish(self) -> PackedExperts {
        PackedExperts { gate_up: self.gate_up.finish(), down: self.down.finish(), shape: self.shape }
    }
}

fn part(panel: usize, index: usize, rows: usize) -> PanelPart {
    let first_row = index * PANEL;
    PanelPart { panel, first_lane: 0, first_row, rows: (rows - first_row).min(PANEL) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{WeightDtype, WeightView};

    #[test]
    fn gate_up_and_down_rows_lie_where_the_kernels_look() {
        let (experts, hidden, inter) = (3, 70, 65);
        let bytes = |seed: usize, len: usize| -> Vec<u8> {
            (0..len).flat_map(|i| ((seed * 7 + i) as f32).to_le_bytes()).collect()
        };
        let mut builder = PackedExperts::builder(experts, hidden, inter, WeightDtype::F32, WeightDtype::F32);
        for e in 0..experts {
            let (gate, up, down) =
                (bytes(e, inter * hidden), bytes(e + 10, inter * hidden), bytes(e + 20, inter * hidden));
            builder.put(e, ExpertMatrix::Gate, WeightView::row_major(&gate, WeightDtype::F32, inter, hidden)).unwrap();
            builder.put(e, ExpertMatrix::Up, WeightView::row_major(&up, WeightDtype::F32, inter, hidden)).unwrap();
            builder.put(e, ExpertMatrix::Down, WeightView::row_major(&down, WeightDtype::F32, hidden, inter)).unwrap();
        }
        builder.put(3, ExpertMatrix::Down, WeightView::row_major(&bytes(0, 1), WeightDtype::F32, 1, 1)).unwrap_err();
        builder.put(0, ExpertMatrix::Down, WeightView::row_major(&bytes(0, 1), WeightDtype::F32, 1, 1)).unwrap_err();
        let packed = builder.finish();
        let mut row = vec![0.0; hidden];
        for e in 0..experts {
            packed.gate_up.unpack_row((packed.gate_panel(e, 1) + 1) * PANEL, &mut row);
            assert_eq!(row[0], ((e + 10) * 7 + 64 * hidden) as f32);
            packed.down.unpack_row(packed.down_panel(e, 1) * PANEL + 5, &mut row[..inter]);
            assert_eq!(row[0], ((e + 20) * 7 + 69 * inter) as f32);
        }
    }
}
