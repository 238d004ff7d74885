package org.dualtoken.demo

import android.util.Base64
import kotlin.math.log10
import org.json.JSONObject

/** The bundle's golden picture and logits, from golden.json. */
class SelfTest(json: String) {
    private val golden = JSONObject(json)

    /** dB between eager's logits and what `run` gives for the golden picture; throws where that is too little. */
    fun check(run: (ByteArray) -> FloatArray): Double {
        val rgba = Base64.decode(golden.getString("rgbaBase64"), Base64.DEFAULT)
        val rgb = ByteArray(rgba.size / 4 * 3) { rgba[it / 3 * 4 + it % 3] }
        val expected = golden.getJSONArray("logits")
        val actual = run(rgb)
        check(actual.size == expected.length()) { "${actual.size} logits, ${expected.length()} expected" }
        var signal = 0.0
        var noise = 0.0
        for (i in actual.indices) {
            val wanted = expected.getDouble(i)
            signal += wanted * wanted
            noise += (actual[i] - wanted) * (actual[i] - wanted)
        }
        val decibels = if (noise == 0.0) 300.0 else 10 * log10(signal / noise)
        val least = golden.getDouble("minimumSqnrDb")
        check(decibels >= least) { "self-test: %.1f dB, at least %.1f are promised".format(decibels, least) }
        return decibels
    }
}
