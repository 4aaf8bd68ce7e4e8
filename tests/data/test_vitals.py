"""Vital signs: real records, small files in the true formats, damage, the generator."""

import datetime
import functools
import gzip
import http.server
import inspect
import math
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from fedjax_sim.data import synthetic_vitals, vitals, vitals_series, vitals_wfdb
from fedjax_sim.data.sources import fingerprint, md5
from fedjax_sim.data.vitals import Record, Vitals, load_vitals

NAME = "p000123-2150-03-01-08-05n"
LISTED = f"p000123/{NAME}"
START = datetime.datetime(2150, 3, 1, 8, 5, 30, 250000)
HEART = np.round(70 + 10 * np.sin(np.arange(40) / 3), 1)
BREATH = np.round(16 + 3 * np.cos(np.arange(40) / 5), 1)


def write_record(
    folder: Path,
    listed: str = LISTED,
    fs: float = 1 / 60,
    start: datetime.datetime | None = START,
    **signals,
) -> Path:
    """A numerics record as PhysioNet has them; returns its header."""
    signals = signals or {"HR": HEART, "RESP": BREATH, "SpO2": BREATH + 80}
    header = folder / f"{listed}.hea"
    header.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # wfdb calls pandas in a deprecated way
        warnings.simplefilter("ignore", DeprecationWarning)
        import wfdb

        wfdb.wrsamp(
            header.stem,
            fs=fs,
            units=["bpm"] * len(signals),
            sig_name=list(signals),
            p_signal=np.stack(list(signals.values()), axis=1),
            fmt=["16"] * len(signals),
            adc_gain=[10.0] * len(signals),
            baseline=[0] * len(signals),
            write_dir=str(header.parent),
            base_datetime=start,
        )
    return header


@pytest.fixture
def numerics(tmp_path):
    """A data folder with one record: its header."""
    return write_record(tmp_path / "vitals" / "mimic_numerics")


def load_numerics(header: Path, **options) -> Vitals:
    return load_vitals("mimic_numerics", header.parents[3], **options)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    cut = ""  # of a file with this ending only half is sent

    def log_message(self, *args):
        pass

    def do_GET(self):
        if not self.cut or not self.path.endswith(self.cut):
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        return None


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that stands for PhysioNet's, and the handler that serves it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(QuietHandler):
        pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{httpd.server_port}/"
        monkeypatch.setattr(vitals_wfdb, "NUMERICS_URL", url)
        yield folder, Handler
        httpd.shutdown()
        thread.join()


def complete(record: Record) -> int:
    """Samples at which every channel was measured."""
    return int((~np.isnan(record.values)).all(axis=1).sum())


class TestRealData:
    def test_mimic_numerics(self, data_dir):
        loaded = load_vitals("mimic_numerics", data_dir)
        sizes = {r.patient: (len(r.values), complete(r)) for r in loaded.records}
        assert sizes == {
            "p000020": (1315, 1274), "s00001": (1936, 1889), "s25047": (72, 44)
        }  # fmt: skip
        starts = {record.patient: record.start for record in loaded.records}
        assert starts["p000020"] == datetime.datetime(2183, 4, 28, 17, 47, 59, 486000)
        # This header has minutes and seconds only; the name says 00-31.
        assert starts["s00001"] == datetime.datetime(2896, 10, 10, 0, 31, 25, 894000)
        assert loaded.interval == 60.0
        assert loaded.licence == "ODbL 1.0"
        first = loaded.records[0].values[0]
        assert first.tolist() == pytest.approx([98.6, 9.8])

    def test_a_record_of_the_numerics_can_be_chosen(self, data_dir):
        listed = "p000020/p000020-2183-04-28-17-47n"
        channels = ("pap_mean", "heart_rate", "spo2")
        loaded = load_vitals("mimic_numerics", data_dir, channels, records=[listed])
        (record,) = loaded.records
        assert record.name == "p000020-2183-04-28-17-47n"
        assert record.values[0].tolist() == pytest.approx([26.2, 98.6, 100.0])
        with pytest.raises(
            ValueError, match="s25047-2704-05-04-10-44n has no pap_mean"
        ):
            load_vitals(
                "mimic_numerics",
                data_dir,
                channels,
                records=[listed, "s25047/s25047-2704-05-04-10-44n.hea"],
            )

    def test_mimic_pap(self, data_dir):
        channels = ("heart_rate", "pap_systolic", "pap_diastolic", "pap_mean")
        everything = load_vitals("mimic_pap", data_dir, channels, one_per_patient=False)
        one = load_vitals("mimic_pap", data_dir, channels)
        assert len(everything.records) == 405
        assert len(one.records) == len({r.patient for r in one.records}) == 351
        assert {len(record.values) for record in everything.records} == {101}
        assert one.interval == 60.0
        record = one.records[0]
        assert record.start == datetime.datetime(2183, 4, 28, 17, 47)
        assert record.values[0].tolist() == pytest.approx([98.6, 35.8, 19.2, 26.2])
        count = {}
        for record in everything.records:
            size = int(np.isfinite(record.values).sum())
            count.setdefault(record.patient, []).append(size)
        for record in one.records:
            assert np.isfinite(record.values).sum() == max(count[record.patient])
        assert min(np.nanmin(r.values[:, 3]) for r in one.records) < 0  # kept as it is

    def test_bidmc(self, data_dir):
        loaded = load_vitals("bidmc", data_dir)
        assert [len(record.values) for record in loaded.records] == [481] * 53
        names = [f"bidmc_{number:02d}" for number in range(1, 54)]
        assert [record.patient for record in loaded.records] == names
        assert {record.start for record in loaded.records} == {None}
        assert loaded.interval == 1.0
        # Of patient 13, 146 rows are empty and 220 are 0.
        assert complete(loaded.records[12]) == 481 - 146 - 220
        minutes = load_vitals("bidmc", data_dir, interval=60)
        assert {len(record.values) for record in minutes.records} == {9}
        seconds = loaded.records[12].values[60:120, 1]
        seconds = [float(value) for value in seconds if not math.isnan(value)]
        assert minutes.records[12].values[1, 1] == pytest.approx(
            sum(seconds) / len(seconds)
        )


class TestMimicNumerics:
    def test_reads_what_was_written(self, numerics):
        loaded = load_numerics(numerics, channels=("respiration_rate", "heart_rate"))
        (record,) = loaded.records
        assert (record.name, record.patient, record.start) == (NAME, "p000123", START)
        assert record.values.dtype == np.float32
        np.testing.assert_allclose(record.values, np.c_[BREATH, HEART], rtol=1e-6)
        assert loaded.channels == ("respiration_rate", "heart_rate")
        assert (loaded.name, loaded.interval) == ("mimic_numerics", 60.0)
        checksum = fingerprint([md5(numerics), md5(numerics.with_suffix(".dat"))])
        assert loaded.source.endswith(f"1 records (md5 of md5s {checksum})")

    def test_what_is_not_measured(self, tmp_path):
        folder = tmp_path / "vitals" / "mimic_numerics"
        heart = np.array([0, -5, np.nan, 70, 71])
        pressure = np.array([0, -5, np.nan, 20, 21])
        header = write_record(folder, HR=heart, PAPMean=pressure)
        (record,) = load_numerics(header, channels=("heart_rate", "pap_mean")).records
        nan = np.nan
        np.testing.assert_array_equal(
            record.values, [[nan, nan], [nan, -5], [nan, nan], [70, 20], [71, 21]]
        )

    def test_names_as_newer_monitors_write_them(self, tmp_path):
        folder = tmp_path / "vitals" / "mimic_numerics"
        signals = {"ABP Sys": HEART + 40, "%SpO2": BREATH + 80}
        header = write_record(folder, **signals)
        (record,) = load_numerics(header, channels=("spo2", "abp_systolic")).records
        np.testing.assert_allclose(
            record.values, np.c_[BREATH + 80, HEART + 40], rtol=1e-6
        )

    def test_records_are_all_or_those_chosen(self, tmp_path):
        folder = tmp_path / "vitals" / "mimic_numerics"
        second = f"p000123/{NAME.replace('08-05', '19-00')}"
        other = "s00009/s00009-2500-01-01-00-00n"
        for listed in (second, other, LISTED):
            header = write_record(folder, listed)
        write_record(folder, f"p000123/{NAME[:-1]}")  # a waveform record: no n
        loaded = load_numerics(header)
        expected = [LISTED, second, other]
        assert [f"{r.patient}/{r.name}" for r in loaded.records] == expected
        chosen = load_numerics(header, records=[other, f"{LISTED}.hea"])
        assert [f"{r.patient}/{r.name}" for r in chosen.records] == [other, LISTED]

    def test_a_record_without_a_date(self, tmp_path):
        header = write_record(tmp_path / "vitals" / "mimic_numerics", start=None)
        assert load_numerics(header).records[0].start is None

    def test_missing_channel(self, numerics):
        with pytest.raises(ValueError, match="has no abp_mean") as caught:
            load_numerics(numerics, channels=("heart_rate", "abp_mean"))
        for part in (NAME, "got HR, RESP, SpO2.", "records=[...]", "other channels"):
            assert part in str(caught.value)

    def test_mixed_intervals(self, tmp_path):
        folder = tmp_path / "vitals" / "mimic_numerics"
        write_record(folder)
        fast = f"p000200/{NAME.replace('p000123', 'p000200')}"
        heart = 80 + np.arange(150) / 10
        header = write_record(folder, fast, fs=1.0, HR=heart, RESP=heart / 5)
        with pytest.raises(ValueError, match="must have one interval") as caught:
            load_numerics(header)
        for part in (f"60 s in {NAME}", "1 s in p000200-", "interval=60,"):
            assert part in str(caught.value)
        loaded = load_numerics(header, interval=60)
        assert loaded.interval == 60
        slow, quick = loaded.records
        np.testing.assert_allclose(slow.values[:, 0], HEART, rtol=1e-6)
        means = [heart[:60].mean(), heart[60:120].mean(), heart[120:].mean()]
        np.testing.assert_allclose(quick.values[:, 0], means, rtol=1e-6)
        with pytest.raises(ValueError, match=f"record {NAME}, 60 s; got 30"):
            load_numerics(header, interval=30)

    def test_no_records(self, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            load_vitals("mimic_numerics", tmp_path)
        for part in (str(tmp_path), "records=[", "--data-dir", "'generated'"):
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        ("records", "error", "message"),
        [
            ([], ValueError, "at least one"),
            (LISTED, TypeError, "must be a list of names"),
            ([NAME], ValueError, "must be <patient>/<record>"),
            (["../p000123/x"], ValueError, "must be <patient>/<record>"),
            ([LISTED, f"{LISTED}.hea"], ValueError, "twice"),
            ([3], TypeError, "must be of type str; got int"),
        ],
    )
    def test_names_that_are_none(self, numerics, records, error, message):
        with pytest.raises(error, match=message):
            load_numerics(numerics, records=records)


class TestDamage:
    def refused(self, header: Path, *parts: str) -> None:
        with pytest.raises(ValueError, match="corrupt or truncated") as caught:
            load_numerics(header)
        for part in (str(header), "Delete the record's files", *parts):
            assert part in str(caught.value)

    @pytest.mark.parametrize("place", [0, 101, 239])
    def test_a_flipped_bit(self, numerics, place):
        dat = numerics.with_suffix(".dat")
        content = bytearray(dat.read_bytes())
        content[place] ^= 4
        dat.write_bytes(content)
        signal = ("HR", "RESP", "SpO2")[place // 2 % 3]
        self.refused(numerics, f"samples of {signal} with the checksum", dat.name)

    @pytest.mark.parametrize("size", [0, 1, 120, 239])
    def test_a_truncated_dat(self, numerics, size):
        dat = numerics.with_suffix(".dat")
        dat.write_bytes(dat.read_bytes()[:size])
        self.refused(numerics, "as many samples", f"{dat.name} of {size} bytes")

    def test_a_missing_dat(self, numerics):
        dat = numerics.with_suffix(".dat")
        dat.unlink()
        self.refused(numerics, f"expected the file {dat}", "got no such file")

    @pytest.mark.parametrize("size", [0, 10, 40, 100])
    def test_a_truncated_header(self, numerics, size):
        numerics.write_bytes(numerics.read_bytes()[:size])
        self.refused(numerics)

    @pytest.mark.parametrize(
        "content",
        [
            np.random.default_rng(0).bytes(400),
            b"\0" * 400,
            b"<!DOCTYPE html>\n<title>Sign in</title>\n",
            f"{NAME}/2 3 0.0166 40\na 20\nb 20\n".encode(),
        ],
        ids=["noise", "zeros", "web page", "segments"],
    )
    def test_no_header(self, numerics, content):
        numerics.write_bytes(content)
        self.refused(numerics, "a WFDB header of one segment")

    @pytest.mark.parametrize("gain", ["0", "0(0)/bpm", "nan/bpm", "inf", "bpm", ""])
    def test_a_wrong_gain(self, numerics, gain):
        """A gain of 0 would be read as 200: a heart rate of 4."""
        lines = numerics.read_text().split("\n")
        fields = lines[2].split()
        lines[2] = " ".join([*fields[:2], gain] + (fields[3:] if gain else []))
        numerics.write_text("\n".join(lines))
        self.refused(numerics, "with gains other than 0")

    @pytest.mark.parametrize(
        "frequency", ["0", "abc", "-1", "nan", "inf", "1e-300", "1e300"]
    )
    def test_a_wrong_frequency(self, numerics, frequency):
        lines = numerics.read_text().split("\n")
        fields = lines[0].split()
        lines[0] = " ".join([*fields[:2], frequency, *fields[3:]])
        numerics.write_text("\n".join(lines))
        self.refused(numerics, "a sampling frequency")

    def test_another_number_of_samples(self, numerics):
        text = numerics.read_text()
        assert " 40 " in text
        numerics.write_text(text.replace(" 40 ", " 39 ", 1))
        self.refused(numerics, "with the checksum")


class TestDownload:
    def test_a_listed_record_is_fetched_once(self, tmp_path, served):
        origin = write_record(served[0] / "p00")
        folder = tmp_path / "data"
        load = functools.partial(
            load_vitals, "mimic_numerics", folder, records=[LISTED]
        )
        fetched = load()
        assert fetched.records[0].start == START
        copies = folder / "vitals" / "mimic_numerics" / "p000123"
        names = [f"{NAME}.dat", f"{NAME}.hea"]
        assert sorted(path.name for path in copies.iterdir()) == names
        assert [path.name for path in copies.parents[1].iterdir()] == ["mimic_numerics"]
        origin.unlink()
        origin.with_suffix(".dat").unlink()
        assert load().source == fetched.source

    def test_only_what_is_absent_is_fetched(self, tmp_path, served):
        write_record(served[0] / "p00").unlink()  # the server has the .dat file only
        header = write_record(tmp_path / "vitals" / "mimic_numerics")
        header.with_suffix(".dat").unlink()
        (record,) = load_numerics(header, records=[LISTED]).records
        np.testing.assert_allclose(record.values[:, 0], HEART, rtol=1e-6)

    @pytest.mark.parametrize("cut", [".hea", ".dat", "none"])
    def test_a_failed_download_leaves_nothing(self, tmp_path, served, cut):
        folder, handler = served
        origin = write_record(folder / "p00")
        if cut == "none":
            origin.with_suffix(".dat").unlink()
        handler.cut = cut
        with pytest.raises(FileNotFoundError) as caught:
            load_vitals("mimic_numerics", tmp_path / "data", records=[LISTED])
        for part in (f"{vitals_wfdb.NUMERICS_URL}p00/p000123/", "--data-dir"):
            assert part in str(caught.value)
        assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []
        assert not list((tmp_path / "data").rglob("p000123"))

    def test_a_web_page_instead_of_a_header(self, tmp_path, served):
        origin = write_record(served[0] / "p00")
        origin.write_text("<html>\n<title>Sign in</title>\n</html>\n")
        with pytest.raises(ValueError, match="corrupt") as caught:
            load_vitals("mimic_numerics", tmp_path / "data", records=[LISTED])
        assert f"{vitals_wfdb.NUMERICS_URL}p00/p000123/{NAME}.hea" in str(caught.value)
        assert not list((tmp_path / "data").rglob("*.hea"))

    def test_what_is_not_fetched(self, tmp_path, served):
        write_record(served[0] / "p00")
        with pytest.raises(FileNotFoundError, match="download=True"):
            load_vitals("mimic_numerics", tmp_path, records=[LISTED], download=False)
        other = "s00009/s00009-2500-01-01-00-00n"
        with pytest.raises(FileNotFoundError, match="by hand") as caught:
            load_vitals("mimic_numerics", tmp_path, records=[other])
        assert f"{other}.hea" in str(caught.value)


PAP_HEADER = "record,subject,t_s,pap_sys,pap_dia,pap_mean,hr\n"


def write_pap(data_dir: Path, rows: str) -> Path:
    path = data_dir / "vitals" / "mimic_pap" / "mimic_pap_numerics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(PAP_HEADER + rows)
    return path


class TestMimicPap:
    ROWS = """\
p000001-2150-01-02-03-04,p000001,0,30,10,20,70
p000001-2150-01-02-03-04,p000001,60,0,,-1,0
p000002-2150-01-02-03-04,p000002,0,30,10,20,60
p000001-2151-01-02-03-04,p000001,0,31,11,21,71
p000001-2151-01-02-03-04,p000001,60,32,12,22,72
p000001-2149-01-02-03-04,p000001,0,33,13,23,73
p000001-2149-01-02-03-04,p000001,120,34,14,24,74
"""

    def test_the_fullest_record_of_a_patient(self, tmp_path):
        path = write_pap(tmp_path, self.ROWS)
        channels = ("pap_systolic", "heart_rate", "pap_mean")
        every = load_vitals("mimic_pap", tmp_path, channels, one_per_patient=False)
        first, _, _, last = every.records
        nan = np.nan
        np.testing.assert_array_equal(first.values, [[30, 70, 20], [nan, nan, -1]])
        np.testing.assert_array_equal(
            last.values, [[33, 73, 23], [nan] * 3, [34, 74, 24]]
        )
        # Two records of p000001 have six values: the earlier is kept.
        one = load_vitals("mimic_pap", tmp_path, channels)
        names = ["p000001-2149-01-02-03-04", "p000002-2150-01-02-03-04"]
        assert [record.name for record in one.records] == names
        assert one.records[0].start == datetime.datetime(2149, 1, 2, 3, 4)
        assert "2 of 4 records" in one.source
        assert md5(path) in one.source

    def test_has_no_respiration(self, tmp_path):
        with pytest.raises(ValueError, match="has no respiration_rate") as caught:
            load_vitals("mimic_pap", tmp_path)
        has = "got heart_rate, pap_systolic, pap_diastolic, pap_mean."
        assert has in str(caught.value)

    def test_an_empty_record(self, tmp_path):
        empty = "p000003-2150-01-02-03-04,p000003,0,1,1,1,0\n"
        write_pap(tmp_path, self.ROWS + empty)
        load = functools.partial(load_vitals, "mimic_pap", tmp_path, ("heart_rate",))
        with pytest.raises(ValueError, match="skip_empty=True") as caught:
            load()
        assert "record p000003-2150-01-02-03-04 needs a measured" in str(caught.value)
        loaded = load(skip_empty=True)
        assert [r.patient for r in loaded.records] == ["p000001", "p000002"]
        assert list(loaded.left_out) == ["p000003-2150-01-02-03-04"]
        assert "no measured sample of heart_rate" in str(loaded.left_out)
        whole = load_vitals("mimic_pap", tmp_path, ("pap_mean",), skip_empty=True)
        assert not whole.left_out
        assert whole.source == loaded.source.replace("2 of 5", "3 of 5")

    def test_an_empty_record_beside_a_fuller_one(self, tmp_path):
        empty = "p000002-2140-01-02-03-04,p000002,0,1,1,1,0\n"
        write_pap(tmp_path, self.ROWS + empty)
        loaded = load_vitals("mimic_pap", tmp_path, ("heart_rate",))
        assert [r.name[:12] for r in loaded.records] == ["p000001-2149", "p000002-2150"]

    def test_a_name_without_a_date(self, tmp_path):
        write_pap(tmp_path, "record1,p000001,0,30,10,20,70\n")
        with pytest.raises(
            ValueError, match=r"records named <patient>-<year>.*'record1'"
        ):
            load_vitals("mimic_pap", tmp_path, ("heart_rate",))


def write_bidmc(data_dir: Path, number: int, rows: str) -> Path:
    path = data_dir / "vitals" / "bidmc" / f"bidmc_{number:02d}_Numerics.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("Time [s], HR, PULSE, RESP, SpO2\n" + rows)
    return path


class TestBidmc:
    def test_times_and_gaps(self, tmp_path):
        write_bidmc(tmp_path, 2, "-1,90,,20,98\n-0,91,89,NaN,97\n2,92,88,0,96\n")
        write_bidmc(tmp_path, 10, "0,80,80,10,99\n")
        loaded = load_vitals("bidmc", tmp_path, ("pulse", "respiration_rate", "spo2"))
        first, second = loaded.records
        nan = np.nan
        np.testing.assert_array_equal(
            first.values, [[nan, 20, 98], [89, nan, 97], [nan] * 3, [88, nan, 96]]
        )
        assert (first.patient, second.patient) == ("bidmc_02", "bidmc_10")
        with pytest.raises(ValueError, match="has no abp_mean"):
            load_vitals("bidmc", tmp_path, ("abp_mean",))

    def test_no_files(self, tmp_path):
        for source, channel in (("bidmc", "spo2"), ("mimic_pap", "pap_mean")):
            with pytest.raises(FileNotFoundError, match="'generated'") as caught:
                load_vitals(source, tmp_path, (channel,))
            assert str(tmp_path / "vitals" / source) in str(caught.value)


def gridded_by_hand(times, values, interval):
    """Mean of what was measured in each bin, sample by sample."""
    bins = {}
    for time, value in zip(times, values, strict=True):
        place = int((time - min(times)) // interval)
        bins.setdefault(place, [])
        if value is not None and value > 0:
            bins[place].append(value)
    result = []
    for place in range(max(bins) + 1):
        inside = bins.get(place, [])
        result.append(sum(inside) / len(inside) if inside else math.nan)
    return result


def write_csv(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text)
    return path


class TestCsv:
    @pytest.mark.parametrize("interval", [None, 90, 3600])
    @pytest.mark.parametrize("dates", [False, True])
    def test_equals_a_plain_loop(self, tmp_path, dates, interval):
        rng = np.random.default_rng(0)
        epoch = datetime.datetime(2183, 4, 28, 17, 47)
        rows, expected = [], {}
        for patient in ("zoe", "7", "ann"):
            times = rng.integers(5, 7_000, 60).tolist()  # with some twice
            hearts = [round(float(x), 1) for x in rng.normal(80, 5, 60)]
            breaths = [
                None if rng.random() < 0.3 else int(x) for x in rng.integers(0, 30, 60)
            ]
            expected[patient] = (times, hearts, breaths)
            for time, heart, breath in zip(times, hearts, breaths, strict=True):
                shown = epoch + datetime.timedelta(seconds=time) if dates else time
                shown_breath = "" if breath is None else breath
                rows.append(f"{shown},x,{heart},{patient},{shown_breath}")
        order = rng.permutation(len(rows))
        text = "when,note,HR,who,RR\n" + "\n".join(rows[i] for i in order) + "\n"
        loaded = load_vitals(
            "csv",
            interval=interval,
            path=write_csv(tmp_path, text),
            patient="who",
            time="when",
            heart_rate="HR",
            respiration_rate="RR",
        )
        assert loaded.interval == (interval or 60)
        first_seen = dict.fromkeys(rows[i].split(",")[3] for i in order)
        assert [record.patient for record in loaded.records] == list(first_seen)
        for record in loaded.records:
            times, *channels = expected[record.patient]
            columns = [gridded_by_hand(times, x, loaded.interval) for x in channels]
            np.testing.assert_allclose(record.values, np.transpose(columns), rtol=1e-6)
            begin = epoch + datetime.timedelta(seconds=min(times))
            assert record.start == (begin if dates else None)

    def test_default_columns_and_relative_path(self, tmp_path, monkeypatch):
        text = "patient,time,heart_rate,respiration_rate\n1,0,80,20\n1,130,81,NULL\n"
        path = write_csv(tmp_path, text)
        monkeypatch.chdir(tmp_path)
        loaded = load_vitals("csv", path="table.csv")
        nan = np.nan
        np.testing.assert_array_equal(
            loaded.records[0].values, [[80, 20], [nan, nan], [81, nan]]
        )
        assert loaded.source == f"table.csv, 1 patients (md5 {md5(path)})"
        Path("table.csv.gz").write_bytes(gzip.compress(text.encode()))
        compressed = load_vitals("csv", path="table.csv.gz")
        np.testing.assert_array_equal(
            compressed.records[0].values, loaded.records[0].values
        )

    def test_excels_byte_order_mark_and_spaces(self, tmp_path):
        text = "\ufeffpatient, time , heart_rate\n p1 ,0, 80 \np1, 60,81\n"
        path = write_csv(tmp_path, text)
        (record,) = load_vitals("csv", channels=("heart_rate",), path=path).records
        assert (record.name, record.values.tolist()) == ("p1", [[80.0], [81.0]])

    def test_fractions_of_a_second_stay_in_their_bin(self, tmp_path):
        rows = "".join(f"p,{k / 10},{50 + k}\n" for k in range(100))
        path = write_csv(tmp_path, "patient,time,heart_rate\n" + rows)
        loaded = load_vitals("csv", channels=("heart_rate",), interval=0.1, path=path)
        assert loaded.records[0].values[:, 0].tolist() == list(range(50, 150))

    def test_zones_are_brought_to_utc(self, tmp_path):
        rows = "p,2183-01-01T02:00:00+02:00,80\np,2183-01-01T00:01:00Z,81\n"
        path = write_csv(tmp_path, "patient,time,heart_rate\n" + rows)
        (record,) = load_vitals("csv", channels=("heart_rate",), path=path).records
        assert record.start == datetime.datetime(2183, 1, 1)
        assert record.values[:, 0].tolist() == [80.0, 81.0]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "a header and rows .*; got EmptyDataError.* in 0 bytes"),
            ("patient,time,heart_rate\n", "rows below the header; got none"),
            ("p,t,hr\n1,0,80\n", "a column 'patient'; got p, t, hr. Say which"),
            ("patient,time,HR\n1,0,80\n", "a column 'heart_rate'; got patient, time"),
            (
                "patient,time,heart_rate,heart_rate\n1,0,80,81\n",
                "a column 'heart_rate'; got it twice in",
            ),
            (
                "patient,time,heart_rate\n1,0,80\n1,60,high\n",
                "finite numbers in 'heart_rate'; got 'high' in row 2 below .*Leave a",
            ),
            ("patient,time,heart_rate\n1,0,inf\n", "got 'inf' in row 1"),
            # Decimal commas: a row has a cell more than the header.
            (
                "patient,time,heart_rate\n1,0,80,5\n",
                "as many cells, in UTF-8; got Pars",
            ),
            (
                "patient,time,heart_rate\n1,0,80\n,60,81\n",
                "in every row; got an empty cell in row 2",
            ),
            ("patient,time,heart_rate\n1,noon,80\n", "got 'noon' in row 1"),
            ("patient,time,heart_rate\n1,04/28/2183,80\n", "got '04/28/2183' in row 1"),
            ("patient,time,heart_rate\n1,2183-02-30,80\n", "got '2183-02-30' in row 1"),
            ("patient,time,heart_rate\n1,0,80\n1,,80\n", "got an empty cell in row 2"),
            ("patient,time,heart_rate\n1,0,80\n1,1h,80\n", "got '1h' in row 2"),
            (
                "patient,time,heart_rate\n1,2183-01-01,80\n1,2183-01-02,80\n1,5,80\n",
                "got '5' in row 3",
            ),
            ('patient,time,heart_rate\n1,0,"80\n', "got ParserError"),
            (
                "patient,time,heart_rate\n1,2183-01-01,80\n1,2183-01-02,80\n"
                "1,2184,80\n",
                "got '2184' in row 3",
            ),
            (
                "patient,time,heart_rate\n1,21830101,80\n1,21830102,80\n",
                "got '21830101' in row 1 .*, which may be either. Write dates with d",
            ),
            (
                "patient,time,heart_rate\n1,2183-01-01T01:00+01:00,80\n"
                "1,2183-01-01T01:00,80\n",
                "the zone of all times in 'time', or of none; got '2183-01-01T01:00'",
            ),
            ("patient,time,heart_rate\n1,0,80\n1,60,1e39\n", r"a sample of 1e\+39"),
            ("patient,time,heart_rate\n1,0,80\n1,6e9,80\n", "milliseconds"),
            ("patient,time,heart_rate\n1,0,80\n1,1e300,80\n", "milliseconds"),
        ],
    )
    def test_damage(self, tmp_path, text, message):
        path = write_csv(tmp_path, text)
        with pytest.raises(ValueError, match=message) as caught:
            load_vitals("csv", channels=("heart_rate",), path=path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("cell", ["1e30", "10001"])
    def test_a_sample_that_no_monitor_shows(self, tmp_path, cell):
        path = write_csv(tmp_path, f"patient,time,heart_rate\np,0,80\np,60,{cell}\n")
        message = r"sample 1 of record p is a heart_rate of 1\S* beats/min: .* 10,000"
        with pytest.raises(ValueError, match=message):
            load_vitals("csv", channels=("heart_rate",), path=path)

    def test_other_bytes(self, tmp_path):
        path = tmp_path / "table.csv"
        path.write_bytes(b"\xff\xfe" + "patient,time\n1,0\n".encode("utf-16-le"))
        with pytest.raises(ValueError, match="UTF-8; got UnicodeDecodeError"):
            load_vitals("csv", path=path)
        path = tmp_path / "table.csv.gz"
        path.write_bytes(gzip.compress(b"patient,time,heart_rate\n1,0,80\n")[:-12])
        with pytest.raises(ValueError, match="is damaged"):
            load_vitals("csv", path=path)

    @pytest.mark.parametrize("cell", ["", "0", "-3"])
    def test_an_empty_patient(self, tmp_path, cell):
        rows = f"1,0,80,20\n2,0,80,{cell}\n"
        path = write_csv(tmp_path, f"patient,time,heart_rate,respiration_rate\n{rows}")
        with pytest.raises(
            ValueError, match="record 2 needs a measured sample of respiration_rate"
        ):
            load_vitals("csv", path=path)
        kept = load_vitals("csv", path=path, skip_empty=True)
        assert [record.name for record in kept.records] == ["1"]
        assert load_vitals("csv", channels=("heart_rate",), path=path).records[1:]

    def test_nothing_is_left(self, tmp_path):
        path = write_csv(tmp_path, "patient,time,heart_rate\n1,0,0\n2,0,\n")
        with pytest.raises(ValueError, match="got 2 records, each without one of them"):
            load_vitals("csv", channels=("heart_rate",), path=path, skip_empty=True)

    def test_options(self, tmp_path):
        path = write_csv(tmp_path, "patient,time,heart_rate\n1,0,80\n")
        load = functools.partial(load_vitals, "csv", channels=("heart_rate",))
        with pytest.raises(TypeError, match="needs the option path; got time"):
            load(time="t")
        with pytest.raises(ValueError, match=r"'paitent'\. Did you mean 'patient'"):
            load(path=path, paitent="p")
        with pytest.raises(ValueError, match="for spo2, which is not loaded"):
            load(path=path, spo2="sat")
        for twice in ({"time": "patient"}, {"heart_rate": "time"}):
            with pytest.raises(ValueError, match=r"columns of their own; got '(pa|ti)"):
                load(path=path, **twice)
        with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
            load(path=tmp_path / "absent.csv")


class TestLoadVitals:
    def test_unknown_names(self):
        with pytest.raises(
            ValueError, match=r"'bidcm'\. Did you mean 'bidmc'.*generated"
        ):
            load_vitals("bidcm")
        with pytest.raises(TypeError, match="source must be of type str"):
            load_vitals(3)
        with pytest.raises(
            ValueError, match=r"'heartrate'\. Did you mean 'heart_rate'"
        ):
            load_vitals("generated", channels=("heartrate",))
        with pytest.raises(TypeError, match=r"Give \('spo2',\)"):
            load_vitals("generated", channels="spo2")
        for channels in ({"spo2"}, (c for c in ["spo2"])):
            with pytest.raises(TypeError, match="a list of names, whose order"):
                load_vitals("generated", channels=channels)
        for channels in ((), ("spo2", "spo2")):
            with pytest.raises(ValueError, match="one or more different names"):
                load_vitals("generated", channels=channels)
        with pytest.raises(ValueError, match=r"option 'patient'\. .*'patients'"):
            load_vitals("generated", patient=3)
        with pytest.raises(ValueError, match=r"bidmc option 'intervall'.*'interval'"):
            load_vitals("bidmc", intervall=60)

    @pytest.mark.parametrize("source", vitals.SOURCES)
    def test_sources_have_options_by_name_only(self, source):
        parameters = inspect.signature(vitals.SOURCES[source]).parameters.values()
        data_dir, channels, *options = parameters
        assert (data_dir.name, channels.name) == ("data_dir", "channels")
        assert {each.kind for each in options} <= {
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.VAR_KEYWORD,
        }

    def test_longer_intervals(self):
        short = load_vitals("generated", patients=2, minutes=100, missing=0.3)
        for factor in (1, 7):
            long = load_vitals(
                "generated", patients=2, minutes=100, missing=0.3, interval=60 * factor
            )
            assert long.interval == 60 * factor
            for one, other in zip(short.records, long.records, strict=True):
                assert (one.name, one.start) == (other.name, other.start)
                assert other.values.dtype == np.float32
                assert other.values.shape == (math.ceil(100 / factor), 2)
                for place, row in enumerate(other.values):
                    for column, mean in enumerate(row):
                        bin_ = one.values[factor * place : factor * (place + 1), column]
                        inside = [float(x) for x in bin_ if not math.isnan(x)]
                        if inside:
                            assert mean == pytest.approx(sum(inside) / len(inside))
                        else:
                            assert math.isnan(mean)

    @pytest.mark.parametrize(
        ("interval", "message"),
        [
            (90, "60 s; got 90. Take 60 or 120,"),
            (30, "60 s; got 30. Take 60,"),
            (0, "interval must be a finite number"),
            (-60, "interval must be a finite number"),
            (math.nan, "interval must be a finite number"),
        ],
    )
    def test_intervals_that_do_not_fit(self, interval, message):
        with pytest.raises(ValueError, match=message):
            load_vitals("generated", minutes=10, interval=interval)

    def test_a_source_of_ones_own(self, monkeypatch, tmp_path):
        def own(data_dir, channels, *, level, interval=None):
            values = np.full((4, len(channels)), level, np.float32)
            record = Record("r", "p", None, values)
            return Vitals("own", (record,), channels, interval, str(data_dir), "mine")

        monkeypatch.setitem(vitals.SOURCES, "own", own)
        loaded = load_vitals("own", tmp_path, ("spo2",), 30, level=97)
        assert loaded.records[0].values.tolist() == [[97.0]] * 4
        assert (loaded.interval, loaded.source) == (30, str(tmp_path))
        with pytest.raises(TypeError, match="'own' needs the option level; got none"):
            load_vitals("own", tmp_path)

    def test_every_channel_has_its_unit(self):
        units = {"beats/min": 2, "breaths/min": 1, "%": 1, "mmHg": 6}
        found = list(vitals_series.CHANNELS.values())
        assert {unit: found.count(unit) for unit in found} == units
        assert set(vitals_wfdb.SIGNALS) == set(vitals_series.CHANNELS)


ALL = ("heart_rate", "respiration_rate", "spo2")


class TestGenerated:
    def test_is_reproducible(self):
        one, two = (load_vitals("generated", channels=ALL, seed=3) for _ in range(2))
        other = load_vitals("generated", channels=ALL, seed=4)
        for a, b, c in zip(one.records, two.records, other.records, strict=True):
            np.testing.assert_array_equal(a.values, b.values)
            assert a.start == b.start
            assert not np.array_equal(a.values, c.values, equal_nan=True)
        assert one.source == two.source != other.source

    def test_a_patient_does_not_depend_on_the_others_nor_on_the_channels(self):
        few = load_vitals("generated", channels=ALL, patients=2, minutes=300)
        many = load_vitals("generated", channels=ALL[1:2], patients=9, minutes=300)
        for a, b in zip(few.records, many.records[:2], strict=True):
            assert (a.name, a.patient, a.start) == (b.name, b.patient, b.start)
            np.testing.assert_array_equal(a.values[:, 1:2], b.values)
        assert len({record.values.tobytes() for record in many.records}) == 9

    def test_format(self):
        loaded = load_vitals("generated", channels=ALL, patients=30, minutes=200)
        assert (loaded.interval, len(loaded.records)) == (60.0, 30)
        assert len({record.start.hour for record in loaded.records}) > 5
        for record in loaded.records:
            assert record.start.date() == datetime.date(2100, 1, 1)
            assert record.values.shape == (200, 3)
            assert record.values.dtype == np.float32
            tenths = 10 * record.values[~np.isnan(record.values)]
            np.testing.assert_allclose(tenths, np.rint(tenths), atol=1e-3)

    def test_limits(self):
        records = load_vitals("generated", channels=ALL, patients=200, minutes=1440)
        values = np.concatenate([record.values for record in records.records])
        for column, (low, high) in enumerate([(30, 220), (4, 60), (70, 100)]):
            assert np.nanmin(values[:, column]) >= low
            assert np.nanmax(values[:, column]) <= high
        assert np.nanmax(values[:, 2]) == 100  # the limits are met
        assert np.nanmean(values, axis=0) == pytest.approx([82, 18, 97], rel=0.05)

    def test_nights_are_lower_than_days(self):
        loaded = load_vitals("generated", patients=60, minutes=2880)
        below = []
        for record in loaded.records:
            hours = (record.start.hour + np.arange(2880) / 60) % 24
            night, day = (hours < 6), (hours >= 12) & (hours < 18)
            means = [np.nanmean(record.values[part], axis=0) for part in (night, day)]
            below.append(means[1] - means[0])
        # Cosines of 3 to 8 beats and 0.6 to 1.6 breaths: over these hours about 1.8 a.
        assert np.mean(below, axis=0) == pytest.approx([1.8 * 5.5, 1.8 * 1.1], rel=0.2)
        assert (np.mean(np.array(below) > 0, axis=0) > 0.85).all()

    def test_correlations(self):
        loaded = load_vitals("generated", channels=ALL, patients=40, missing=0)
        lag, within = [], []
        for record in loaded.records:
            values = record.values - np.median(record.values, axis=0)
            assert not np.isnan(values).any()
            lag.append([np.corrcoef(x[:-1], x[1:])[0, 1] for x in values.T])
            within.append(np.corrcoef(values.T)[0, 1:])
        assert np.median(lag, axis=0)[0] > 0.75
        assert (np.median(lag, axis=0)[1:] > 0.4).all()
        heart_breath, heart_spo2 = np.mean(within, axis=0)
        assert heart_breath > 0.25
        assert heart_spo2 < -0.1

    @pytest.mark.parametrize("missing", [0.0, 0.02, 0.3, 0.9])
    def test_share_missing(self, missing):
        loaded = load_vitals(
            "generated", channels=ALL, patients=60, minutes=2880, missing=missing
        )
        absent = np.isnan(np.concatenate([r.values for r in loaded.records]))
        assert absent.mean(axis=0) == pytest.approx(missing, rel=0.1)
        if 0 < missing < 0.1:  # in bursts, half of them of all channels
            starts = absent[1:] & ~absent[:-1]
            assert absent.sum() / starts.sum() == pytest.approx(5, rel=0.15)
            together = absent.all(axis=1).sum() / absent[:, 0].sum()
            assert together == pytest.approx(0.5, abs=0.1)

    def test_drop_outs_are_as_frequent_in_the_first_minute(self):
        rng = np.random.default_rng(0)
        rate = math.log(2) / 5  # half of the time
        first = [synthetic_vitals._drop_outs(rng, 1, rate)[0] for _ in range(3000)]
        assert np.mean(first) == pytest.approx(0.5, abs=0.04)

    def test_noise_has_the_variance_and_the_memory_it_says(self):
        rng = np.random.default_rng(0)
        noise = synthetic_vitals._ar1(rng, 4000, 200, 45.0)
        assert noise.std() == pytest.approx(1, abs=0.03)
        assert noise[0].std() == pytest.approx(1, abs=0.15)  # from the start
        lag = np.mean(noise[45:] * noise[:-45]) / np.mean(noise**2)
        assert lag == pytest.approx(math.exp(-1), abs=0.03)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"patients": 0}, ValueError, "patients must be an integer of at least 1"),
            ({"minutes": 2.5}, TypeError, "minutes must be an integer"),
            ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
            ({"missing": 1.0}, ValueError, r"missing must be .* in \[0, 1\); got 1"),
            ({"channels": ("pulse",)}, ValueError, "has no pulse: .*got heart_rate, "),
        ],
    )
    def test_wrong_options(self, options, error, message):
        with pytest.raises(error, match=message):
            load_vitals("generated", **options)
