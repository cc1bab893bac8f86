//! How often something happened lately: a sliding window, counted in slots.

use std::collections::VecDeque;

/// Slots of a window. What happened in the same slot is forgotten together, so the window is exact to
/// a 240th of its length: a quarter of a second of a minute, six minutes of a day.
const SLOTS: i64 = 240;

/// How long a window looks back.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Span {
    slot_ms: i64,
}

impl Span {
    pub const MINUTE: Self = Self { slot_ms: 60_000 / SLOTS };
    pub const DAY: Self = Self { slot_ms: 86_400_000 / SLOTS };
}

/// The events of the last while. Only slots in which something happened are kept.
#[derive(Clone, Debug)]
pub struct Window {
    span: Span,
    /// Slot number and count, oldest first.
    slots: VecDeque<(i64, u32)>,
    total: u32,
}

impl Window {
    pub fn new(span: Span) -> Self {
        Self { span, slots: VecDeque::new(), total: 0 }
    }

    /// How many happened within the window.
    pub fn count(&mut self, now_ms: i64) -> u32 {
        let oldest = self.slot(now_ms).saturating_sub(SLOTS);
        while let Some(&(slot, count)) = self.slots.front()
            && slot <= oldest
        {
            self.slots.pop_front();
            self.total = self.total.saturating_sub(count);
        }
        self.total
    }

    pub fn add(&mut self, now_ms: i64, times: u32) {
        // A clock that was set back does not bring an earlier slot after a later one.
        let slot = self.slots.back().map_or(i64::MIN, |last| last.0).max(self.slot(now_ms));
        match self.slots.back_mut() {
            Some((last, count)) if *last == slot => *count = count.saturating_add(times),
            _ => self.slots.push_back((slot, times)),
        }
        self.total = self.total.saturating_add(times);
    }

    /// When fewer than `limit` will be within the window, if nothing more happens.
    pub fn has_room_at_ms(&self, limit: u32) -> i64 {
        let mut left = self.total;
        for (slot, count) in &self.slots {
            left = left.saturating_sub(*count);
            if left < limit {
                return self.end_of(*slot);
            }
        }
        i64::MIN
    }

    /// When all that is counted will be forgotten.
    pub fn is_empty_at_ms(&self) -> i64 {
        self.slots.back().map_or(i64::MIN, |(slot, _)| self.end_of(*slot))
    }

    fn slot(&self, now_ms: i64) -> i64 {
        now_ms.div_euclid(self.span.slot_ms)
    }

    fn end_of(&self, slot: i64) -> i64 {
        slot.saturating_add(SLOTS).saturating_mul(self.span.slot_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_775_563_200_000;

    #[test]
    fn a_window_slides() {
        let mut window = Window::new(Span::MINUTE);
        for second in 0..60 {
            window.add(NOW + second * 1000, 1);
        }
        assert_eq!(window.count(NOW + 59_999), 60);
        // Each leaves a minute after it came, one by one; no border brings all of them back.
        assert_eq!(window.count(NOW + 60_000), 59);
        assert_eq!(window.count(NOW + 60_999), 59);
        assert_eq!(window.count(NOW + 61_000), 58);
        assert_eq!(window.count(NOW + 118_999), 1);
        assert_eq!(window.count(NOW + 119_000), 0);
    }

    #[test]
    fn it_says_when_there_is_room() {
        let mut window = Window::new(Span::MINUTE);
        assert_eq!(window.has_room_at_ms(1), i64::MIN);
        window.add(NOW, 1);
        window.add(NOW + 10_000, 1);
        window.add(NOW + 20_000, 1);
        assert_eq!(window.has_room_at_ms(3), NOW + 60_000);
        assert_eq!(window.has_room_at_ms(2), NOW + 70_000);
        assert_eq!(window.has_room_at_ms(1), NOW + 80_000);
        assert_eq!(window.is_empty_at_ms(), NOW + 80_000);
    }

    #[test]
    fn a_clock_set_back_loses_nothing() {
        let mut window = Window::new(Span::DAY);
        window.add(NOW, 1);
        window.add(NOW - 3_600_000, 1);
        assert_eq!(window.count(NOW - 3_600_000), 2);
        assert_eq!(window.count(NOW + 86_399_000), 2);
        assert_eq!(window.count(NOW + 86_400_000), 0);
    }

    #[test]
    fn a_busy_window_keeps_a_bounded_number_of_slots() {
        let mut window = Window::new(Span::MINUTE);
        for ms in 0..200_000 {
            window.count(NOW + ms);
            window.add(NOW + ms, 1);
        }
        assert!(window.slots.len() <= 240, "{}", window.slots.len());
        assert!((59_750..=60_000).contains(&window.total), "{}", window.total);
    }
}
