//! `strftime` for templates that print today's date.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The present time in UTC by a `strftime` format; codes it does not know stay as they are.
pub(crate) fn now(format: &str) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    at(seconds, format)
}

/// `format` filled in for a Unix time in seconds.
fn at(seconds: u64, format: &str) -> String {
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (second_of_day / 3_600, second_of_day / 60 % 60, second_of_day % 60);
    let month_name = MONTHS[month - 1];
    let day_name = DAYS[(days as usize + 4) % 7];
    let hour12 = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut codes = format.chars();
    while let Some(c) = codes.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let code = codes.next();
        // glibc's "%-d" leaves the padding out.
        let (padded, code) = if code == Some('-') { (false, codes.next()) } else { (true, code) };
        let number = |value: u64| if padded { format!("{value:02}") } else { value.to_string() };
        match code {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &number(year % 100),
            Some('m') => out += &number(month as u64),
            Some('d') => out += &number(day),
            Some('H') => out += &number(hour),
            Some('I') => out += &number(hour12),
            Some('M') => out += &number(minute),
            Some('S') => out += &number(second),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('B') => out += month_name,
            Some('b' | 'h') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('F') => out += &at(seconds, "%Y-%m-%d"),
            Some('T') => out += &at(seconds, "%H:%M:%S"),
            Some('%') => out.push('%'),
            Some(other) => {
                out.push('%');
                out.push(other);
            }
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a day counted from 1970-01-01 (Howard Hinnant's `civil_from_days`).
fn civil_date(days: u64) -> (u64, usize, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month as usize, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_come_out_right() {
        assert_eq!(at(0, "%A %d %B %Y %H:%M:%S"), "Thursday 01 January 1970 00:00:00");
        assert_eq!(
            at(1_709_210_096, "%a %-d %b %y, %I:%M %p, %F %T 100%%"),
            "Thu 29 Feb 24, 12:34 PM, 2024-02-29 12:34:56 100%"
        );
        assert_eq!(at(4_102_444_799, "%d %b %Y"), "31 Dec 2099");
    }
}
